//! Feature → capability: what is held, and what the configuration asks for.

use connmon_host::sandbox::{self, Feature, FeatureKind};
use rustix::thread::CapabilitySet;

use super::{Findings, Line, Outcome, line};

/// First Linux that charges a ring to the memory cgroup instead of the limit
/// of locked memory.
const RING_NEEDS_NO_LIMIT: (u32, u32) = (5, 11);

/// One line about all capabilities, then one a feature.
pub(super) fn judge(findings: &Findings) -> Vec<Line> {
    let mut missing = CapabilitySet::empty();
    let mut features = Vec::new();
    for feature in sandbox::FEATURES {
        let line = judge_feature(findings, feature);
        if line.result > Outcome::Ok {
            missing |= feature.needs - findings.facts.capabilities;
        }
        features.push(line);
    }
    let all = sandbox::FEATURES
        .iter()
        .fold(CapabilitySet::empty(), |all, feature| all | feature.needs);
    let held = match findings.facts.capabilities & all {
        held if held.is_empty() => "none".to_owned(),
        held => names(held),
    };
    let worst = features.iter().map(|line| line.result).max();
    let result = worst.map_or(Outcome::Ok, |worst| worst.max(Outcome::Ok));
    let cause = format!("{held} held");
    let mut lines = vec![line("capabilities", result, cause, grant(missing))];
    lines.append(&mut features);
    lines
}

fn judge_feature(findings: &Findings, feature: &Feature) -> Line {
    let held = findings.facts.capabilities;
    let mut needs = feature.needs;
    if feature.kind == FeatureKind::Tracing
        && !held.contains(needs)
        && held.contains(CapabilitySet::SYS_ADMIN)
    {
        // It stands for both (include/linux/capability.h).
        needs = CapabilitySet::SYS_ADMIN;
    }
    let missing = needs - held;
    let (result, cause, remedy) = if missing.is_empty() {
        let cause = format!("{} held", names(needs));
        (Outcome::Ok, cause, String::new())
    } else if let Some(reason) = not_needed(findings, feature.kind) {
        let cause = format!("{} not held, nor needed: {reason}", names(missing));
        (Outcome::Info, cause, String::new())
    } else {
        let result = match feature.kind {
            // The agent does not start without its port.
            FeatureKind::LowPort => Outcome::Failed,
            _ => Outcome::Degraded,
        };
        let cause = format!("{} not held; without: {}", names(missing), feature.without);
        (result, cause, grant(missing))
    };
    line(format!("feature: {}", feature.name), result, cause, remedy)
}

/// Why the agent would do without, as it is configured, on this host.
fn not_needed(findings: &Findings, feature: FeatureKind) -> Option<&'static str> {
    let asked = &findings.asked;
    match feature {
        FeatureKind::Tracing => asked.polling.then_some("--source proc"),
        FeatureKind::Owners => {
            (!asked.listeners && !asked.all_netns).then_some("--listeners off, --netns host")
        }
        FeatureKind::OtherNamespaces => (!asked.all_netns).then_some("--netns host"),
        FeatureKind::Stats => (!asked.stats).then_some("--ebpf.stats is off"),
        FeatureKind::Ring if findings.facts.version() >= RING_NEEDS_NO_LIMIT => {
            Some("this kernel is newer")
        }
        FeatureKind::Ring if findings.tracing.is_ok() => Some("the limit is high enough"),
        FeatureKind::Ring => asked.polling.then_some("--source proc"),
        FeatureKind::LowPort => {
            (!asked.low_port).then_some("no --web.listen-address has such a port")
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
    use super::super::tests::{find, good};
    use super::*;

    fn results(findings: &Findings) -> Vec<Outcome> {
        judge(findings).iter().map(|line| line.result).collect()
    }

    #[test]
    fn a_missing_capability_degrades_what_is_asked_for_alone() {
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
        findings.asked.listeners = false;
        findings.asked.all_netns = false;
        assert_eq!(results(&findings), [Ok, Ok, Info, Info, Info, Info, Info]);
        findings.asked.stats = true;
        findings.asked.low_port = true;
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
    fn an_old_kernel_needs_a_limit_or_a_capability_for_the_ring() {
        let mut findings = good();
        findings.facts.capabilities = CapabilitySet::empty();
        findings.facts.release = "5.10.0-32-cloud-amd64".into();
        assert_eq!(results(&findings)[5], Outcome::Info);
        findings.tracing = Err(super::super::NoTracing::new("no", "x", true));
        assert_eq!(results(&findings)[5], Outcome::Degraded);
    }
}
