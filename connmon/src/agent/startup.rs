//! The first lines of the log: what is watched, and what is not measured.

use connmon_core::fold::Snapshot;
use connmon_core::geo::Country;
use connmon_core::probe::{Method, Probe, Rung};
use connmon_core::report::Source;

/// `watching 3 network namespaces by eBPF: 14 connections (0 public, 3 private;
/// 11 loopback hidden, --filter.loopback include shows them)`.
pub fn summary(snapshot: &Snapshot, namespaces: u64, source: Source) -> String {
    let count = |wanted: fn(Country) -> bool| -> u64 {
        let rows = snapshot.countries.iter();
        rows.filter(|row| wanted(row.country))
            .flat_map(|row| &row.flows)
            .map(|flow| flow.connections)
            .sum()
    };
    let mut kinds = format!(
        "{} public, {} private",
        count(Country::is_public),
        count(|country| country == Country::PRIVATE)
    );
    let loopback = count(|country| country == Country::LOOPBACK);
    let unknown = count(|country| country == Country::UNKNOWN);
    let (hidden, excluded) = (snapshot.hidden_loopback, snapshot.hidden_excluded);
    for (number, text) in [
        (loopback, ", {} loopback"),
        (unknown, ", {} of unknown country"),
        (
            hidden,
            "; {} loopback hidden, --filter.loopback include shows them",
        ),
        (excluded, "; {} hidden by --filter.exclude"),
    ] {
        if number > 0 {
            kinds += &text.replace("{}", &number.to_string());
        }
    }
    let how = match source {
        Source::Ebpf => "by eBPF",
        Source::Proc => "by polling /proc",
    };
    format!(
        "watching {} {how}: {} ({kinds})",
        plural(namespaces, "network namespace"),
        plural(snapshot.established + hidden + excluded, "connection"),
    )
}

/// What this kernel does not let connmon measure although it traces, in one
/// sentence; `None` where nothing is missing. Counts are never among it.
pub fn not_measured(rungs: &[Rung], traffic: bool) -> Option<String> {
    let lacks = |probe| {
        let mut rungs = rungs.iter();
        rungs.any(|rung| rung.probe == probe && rung.method == Method::None)
    };
    let missing: Vec<&str> = [
        (
            lacks(Probe::Connect),
            "the connect latency of TCP Fast Open",
        ),
        (lacks(Probe::Accept), "accept waits and accepting processes"),
        (!traffic, "bytes, retransmits and round-trip times"),
    ]
    .into_iter()
    .filter_map(|(is_missing, what)| is_missing.then_some(what))
    .collect();
    (!missing.is_empty()).then(|| {
        format!(
            "every connection is counted; not measured on this kernel: {}; connmon check explains why",
            missing.join("; ")
        )
    })
}

fn plural(count: u64, noun: &str) -> String {
    let ending = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expose::sample;

    #[test]
    fn the_numbers_of_the_summary_add_up() {
        let mut snapshot = sample::report().snapshot;
        snapshot.countries = vec![
            sample::country(Country::PRIVATE, [1, 2, 0], [0; 3]),
            sample::country(Country::UNKNOWN, [0, 0, 4], [0; 3]),
        ];
        (snapshot.established, snapshot.hidden_loopback) = (7, 11);
        snapshot.hidden_excluded = 2;
        assert_eq!(
            summary(&snapshot, 3, Source::Ebpf),
            "watching 3 network namespaces by eBPF: 20 connections (0 public, 3 private, 4 of unknown \
             country; 11 loopback hidden, --filter.loopback include shows them; 2 hidden by \
             --filter.exclude)"
        );
        (snapshot.hidden_loopback, snapshot.hidden_excluded) = (0, 0);
        snapshot.countries.clear();
        snapshot.established = 1;
        assert_eq!(
            summary(&snapshot, 1, Source::Proc),
            "watching 1 network namespace by polling /proc: 1 connection (0 public, 0 private)"
        );
    }

    #[test]
    fn a_missing_probe_is_one_sentence() {
        let mut rungs = sample::report().status.rungs;
        assert_eq!(not_measured(&rungs, true), None);
        rungs[2].method = Method::None;
        assert_eq!(
            not_measured(&rungs, true).as_deref(),
            Some(
                "every connection is counted; not measured on this kernel: accept waits and \
                 accepting processes; connmon check explains why"
            )
        );
    }
}
