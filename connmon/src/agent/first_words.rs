//! The one line at start that a person understands.

use connmon_core::fold::Snapshot;
use connmon_core::geo::Country;
use connmon_core::report::Source;

use super::status::StatusBoard;

/// `watching 3 namespaces by eBPF: 14 connections (0 public, 3 private; 11
/// loopback hidden, --filter.loopback include shows them)`.
pub fn line(snapshot: &Snapshot, board: &StatusBoard) -> String {
    words(snapshot, board.namespaces(), board.source())
}

fn words(snapshot: &Snapshot, namespaces: u64, source: Source) -> String {
    let count = |wanted: fn(Country) -> bool| -> u64 {
        snapshot
            .countries
            .iter()
            .filter(|row| wanted(row.country))
            .flat_map(|row| &row.flows)
            .map(|flow| flow.connections)
            .sum()
    };
    let mut kinds = vec![
        format!("{} public", count(Country::is_public)),
        format!("{} private", count(|country| country == Country::PRIVATE)),
    ];
    let loopback = count(|country| country == Country::LOOPBACK);
    if loopback > 0 {
        kinds.push(format!("{loopback} loopback"));
    }
    let unknown = count(|country| country == Country::UNKNOWN);
    if unknown > 0 {
        kinds.push(format!("{unknown} of unknown country"));
    }
    let mut kinds = kinds.join(", ");
    if snapshot.hidden_loopback > 0 {
        kinds += &format!(
            "; {} loopback hidden, --filter.loopback include shows them",
            snapshot.hidden_loopback
        );
    }
    if snapshot.hidden_excluded > 0 {
        kinds += &format!("; {} hidden by --filter.exclude", snapshot.hidden_excluded);
    }
    let how = match source {
        Source::Ebpf => "by eBPF",
        Source::Proc => "by polling /proc",
    };
    format!(
        "watching {} {how}: {} ({kinds})",
        plural(namespaces, "namespace"),
        plural(
            snapshot.established + snapshot.hidden_loopback + snapshot.hidden_excluded,
            "connection"
        ),
    )
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
    fn the_parts_add_up() {
        let mut snapshot = sample::report().snapshot;
        snapshot.countries = vec![
            sample::country(Country::PRIVATE, [1, 2, 0], [0; 3]),
            sample::country(Country::UNKNOWN, [0, 0, 4], [0; 3]),
        ];
        (snapshot.established, snapshot.hidden_loopback) = (7, 11);
        snapshot.hidden_excluded = 2;
        assert_eq!(
            words(&snapshot, 3, Source::Ebpf),
            "watching 3 namespaces by eBPF: 20 connections (0 public, 3 private, 4 of unknown \
             country; 11 loopback hidden, --filter.loopback include shows them; 2 hidden by \
             --filter.exclude)"
        );
        (snapshot.hidden_loopback, snapshot.hidden_excluded) = (0, 0);
        snapshot.countries.clear();
        snapshot.established = 1;
        assert_eq!(
            words(&snapshot, 1, Source::Proc),
            "watching 1 namespace by polling /proc: 1 connection (0 public, 0 private)"
        );
    }
}
