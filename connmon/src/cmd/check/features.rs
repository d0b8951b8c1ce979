//! Feature → capability: what is held, and what the configuration asks for.

use connmon_host::sandbox::{self, Feature, FeatureKind};
use rustix::thread::CapabilitySet;

use super::{Findings, Line, Outcome};

/// First Linux that charges a ring to the memory cgroup instead of the limit
/// of locked memory.
const RING_NEEDS_NO_LIMIT: (u32, u32) = (5, 11);

/// One line about all capabilities, then one a feature.
pub(super) fn judge(findings: &Findings) -> Vec<Line> {
    let mut all = CapabilitySet::empty();
    let mut missing = CapabilitySet::empty();
    let mut worst = Outcome::Ok;
    let mut lines = Vec::new();
    for feature in sandbox::FEATURES {
        let line = judge_feature(findings, feature);
        all |= feature.needs;
        if line.result > Outcome::Ok {
            missing |= feature.needs - findings.facts.capabilities;
        }
        worst = worst.max(line.result);
        lines.push(line);
    }
    let held = findings.facts.capabilities & all;
    let held = if held.is_empty() {
        "none".to_owned()
    } else {
        names(held)
    };
    lines.insert(
        0,
        Line::new(
            "capabilities",
            worst,
            format!("{held} held"),
            grant(missing),
        ),
    );
    lines
}

fn judge_feature(findings: &Findings, feature: &Feature) -> Line {
    let check = format!("feature: {}", feature.name);
    let held = findings.facts.capabilities;
    let mut needs = feature.needs;
    if feature.kind == FeatureKind::Tracing
        && !held.contains(needs)
        && held.contains(CapabilitySet::SYS_ADMIN)
    {
        // It includes both (include/linux/capability.h).
        needs = CapabilitySet::SYS_ADMIN;
    }
    let missing = needs - held;
    if missing.is_empty() {
        return Line::ok(check, format!("{} held", names(needs)));
    }
    if let Some(reason) = not_needed(findings, feature.kind) {
        return Line::info(
            check,
            format!("{} neither held nor needed: {reason}", names(missing)),
        );
    }
    let cause = format!("{} not held; without: {}", names(missing), feature.without);
    match feature.kind {
        // The agent does not start without its port.
        FeatureKind::LowPort => Line::failed(check, cause, grant(missing)),
        _ => Line::degraded(check, cause, grant(missing)),
    }
}

/// Why the agent does not need the feature, as it is configured, on this host.
fn not_needed(findings: &Findings, feature: FeatureKind) -> Option<&'static str> {
    let config = &findings.config;
    match feature {
        FeatureKind::Ring if findings.facts.version() >= RING_NEEDS_NO_LIMIT => {
            Some("this kernel is newer")
        }
        FeatureKind::Ring if findings.tracing.is_ok() => Some("the limit is high enough"),
        FeatureKind::Tracing | FeatureKind::Ring => findings.polling().then_some("--source proc"),
        FeatureKind::Owners => {
            (!config.listeners && !config.all_netns).then_some("--listeners off, --netns host")
        }
        FeatureKind::OtherNamespaces => (!config.all_netns).then_some("--netns host"),
        FeatureKind::Stats => (!config.bpf_stats).then_some("--ebpf.stats is off"),
        FeatureKind::LowPort => {
            (!findings.low_port).then_some("no --web.listen-address has such a port")
        }
    }
}

fn names(set: CapabilitySet) -> String {
    let names: Vec<String> = set.iter().map(sandbox::names).collect();
    names.join(" and ")
}

fn grant(missing: CapabilitySet) -> String {
    if missing.is_empty() {
        return String::new();
    }
    format!(
        "grant {} (systemd AmbientCapabilities=, docker --cap-add), or run as root",
        names(missing)
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::{find, good, no_tracing};
    use super::*;

    fn results(findings: &Findings) -> Vec<Outcome> {
        judge(findings).iter().map(|line| line.result).collect()
    }

    #[test]
    fn a_missing_capability_degrades_what_needs_it() {
        use Outcome::{Degraded, Info, Ok};
        let mut findings = good();
        findings.facts.capabilities = CapabilitySet::BPF | CapabilitySet::PERFMON;
        let lines = judge(&findings);
        let all = find(&lines, "capabilities");
        assert_eq!(all.cause, "CAP_PERFMON and CAP_BPF held");
        assert!(all.remedy.starts_with(
            "grant CAP_DAC_READ_SEARCH and CAP_SYS_PTRACE and CAP_SYS_ADMIN (systemd"
        ));
        let expected = [Degraded, Ok, Degraded, Degraded, Info, Info, Info];
        assert_eq!(results(&findings), expected, "{lines:#?}");
        for line in &lines {
            assert_eq!(line.remedy.is_empty(), line.result < Degraded, "{line:?}");
        }
        findings.config.listeners = false;
        findings.config.all_netns = false;
        assert_eq!(results(&findings), [Ok, Ok, Info, Info, Info, Info, Info]);
        findings.config.bpf_stats = true;
        findings.low_port = true;
        let expected = [
            Outcome::Failed,
            Ok,
            Info,
            Info,
            Degraded,
            Info,
            Outcome::Failed,
        ];
        assert_eq!(results(&findings), expected);
    }

    #[test]
    fn sys_admin_stands_for_both_tracing_capabilities() {
        let mut findings = good();
        findings.facts.capabilities = CapabilitySet::SYS_ADMIN;
        assert_eq!(results(&findings)[1], Outcome::Ok);
        assert_eq!(judge(&findings)[1].cause, "CAP_SYS_ADMIN held");
    }

    #[test]
    fn an_old_kernel_charges_the_ring_to_a_limit() {
        let mut findings = good();
        findings.facts.capabilities = CapabilitySet::empty();
        findings.facts.release = "5.10.0-32-cloud-amd64".into();
        assert_eq!(results(&findings)[5], Outcome::Info);
        findings.tracing = Err(no_tracing());
        assert_eq!(results(&findings)[5], Outcome::Degraded);
    }
}
