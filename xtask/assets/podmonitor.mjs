// A PodMonitor (stdin, YAML among other documents) against the types of the
// Prometheus operator. Those say nothing about unknown fields, so each name
// used must also be one that the type's own code names.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(join(process.cwd(), "x.js"));
const root = join(process.cwd(), "node_modules/@kubernetes-models/prometheus-operator");
const load = async (file) => import(pathToFileURL(file));
const { PodMonitor } = await load(join(root, "monitoring.coreos.com/v1/PodMonitor.js"));
const { parseAllDocuments } = require("yaml");

const type = "ComGithubPrometheusOperatorPrometheusOperatorPkgApisMonitoringV1";
const known = (name, object) => {
  const code = readFileSync(join(root, "_schemas", `${type}${name}.js`), "utf8");
  for (const key of Object.keys(object)) {
    if (!new RegExp(`\\b${key}\\b`).test(code)) throw new Error(`${name} has no field ${key}`);
  }
};

let found = 0;
for (const parsed of parseAllDocuments(readFileSync(0, "utf8"))) {
  const document = parsed.toJS();
  if (document.kind !== "PodMonitor") continue;
  found++;
  new PodMonitor(document).validate();
  known("PodMonitorSpec", document.spec);
  for (const endpoint of document.spec.podMetricsEndpoints) {
    known("PodMetricsEndpoint", endpoint);
    for (const rule of endpoint.relabelings ?? []) known("RelabelConfig", rule);
  }
}
if (found !== 1) throw new Error(`${found} PodMonitors instead of 1`);
