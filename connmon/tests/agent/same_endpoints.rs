//! Sockets of one namespace with the same endpoints, see [`devices`].

use crate::devices;
use crate::namespaces::may_run;

/// Audits and samples as often as they may be.
const EBPF: [&str; 6] = [
    "--source",
    "ebpf",
    "--reconcile.interval",
    "300ms",
    "--traffic.interval",
    "200ms",
];
const POLLING: [&str; 4] = ["--source", "proc", "--proc.interval", "100ms"];

#[test]
fn seeds_with_the_same_endpoints_are_each_counted() {
    if may_run("seeds with the same endpoints") {
        devices::seeds_are_each_counted(&EBPF, true);
        devices::seeds_are_each_counted(&POLLING, false);
    }
}

#[test]
fn opens_with_the_same_endpoints_are_each_counted() {
    if may_run("opens with the same endpoints") {
        devices::opens_are_each_counted(&EBPF, true);
        devices::opens_are_each_counted(&POLLING, false);
    }
}
