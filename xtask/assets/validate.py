"""Kubernetes manifests (stdin, YAML) against the schemas of one release.

Unknown fields are errors. What is no kind of Kubernetes itself is listed on
standard output, one kind a line, for someone else to check.
"""

import sys

import kubernetes_validate
import yaml

failed = False
for document in yaml.safe_load_all(sys.stdin):
    what = f"{document['kind']} {document['metadata']['name']}"
    if not document["apiVersion"].startswith(("v1", "apps/")):
        print(document["kind"])
        continue
    try:
        kubernetes_validate.validate(document, sys.argv[1], strict=True)
    except kubernetes_validate.ValidationError as error:
        print(f"{what}: {'.'.join(map(str, error.path))}: {error.message}", file=sys.stderr)
        failed = True
sys.exit(failed)
