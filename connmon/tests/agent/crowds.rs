//! Many connections at once: beyond the cap, and under an audit.

use std::time::Instant;

use crate::harness::{Agent, Scrape};
use crate::held::Held;
use crate::load::{Load, alone};
use crate::namespaces::{Namespace, may_run};

/// Ports inside namespaces of our own; below the ephemeral range.
const CAPPED_PORT: u16 = 7201;
const AUDITED_PORT: u16 = 7202;
const AUDIT_LOAD_PORT: u16 = 7203;

fn of(scrape: &Scrape, family: &str, port: u16) -> f64 {
    scrape.sum(family, &[("port", &port.to_string())])
}

#[test]
fn beyond_the_cap_every_open_is_counted_and_none_is_kept() {
    if !may_run("fifty thousand connections and a cap") {
        return;
    }
    let _alone = alone();
    const CAP: f64 = 1_000.0;
    const CONNECTIONS: u32 = 50_000;
    const SOCKETS: f64 = 2.0 * CONNECTIONS as f64;
    // What a scrape's own connection may add.
    const SCRAPES: f64 = 20.0;
    let namespace = Namespace::new();
    namespace.run(|| {
        let mut args = vec!["--source", "ebpf", "--filter.loopback", "include"];
        args.extend(["--netns", "host", "--connections.max", "1000"]);
        let port = CAPPED_PORT.to_string();
        args.extend(["--ports.allow", &port]);
        let agent = Agent::start(&args);
        agent.check_laws();
        let before = agent.memory();
        let crowd = Held::crowd(&namespace, CAPPED_PORT, CONNECTIONS);
        let full = agent.scrape();
        let rise = agent.memory().saturating_sub(before);
        assert_eq!(full.sum("connmon_events_dropped_total", &[]), 0.0);
        let opened = of(&full, "connmon_port_connections_opened_total", CAPPED_PORT);
        assert_eq!(opened, SOCKETS);
        let gauge = of(&full, "connmon_port_connections", CAPPED_PORT);
        let tracked = full.sum("connmon_tracked_connections", &[]);
        assert!(gauge <= tracked && tracked <= CAP, "{gauge} of {tracked}");
        for family in [
            "connmon_untracked_connections",
            "connmon_table_overflow_total",
        ] {
            let beyond = full.sum(family, &[]) - (SOCKETS - gauge);
            assert!((0.0..=SCRAPES).contains(&beyond), "{family}: {beyond} more");
        }
        println!("{rise} bytes for {SOCKETS} sockets, {tracked} of them tracked");
        assert!(rise < 16 << 20, "{rise} bytes more");
        drop(crowd);
        agent.until("the end of all", |scrape| {
            of(scrape, "connmon_port_connections", CAPPED_PORT) == 0.0
                && scrape.sum("connmon_untracked_connections", &[]) <= SCRAPES
        });
        agent.stop();
    });
}

/// A ring that would overflow if nobody drained it while the tables are
/// read, as the load's pace and the walk's length say.
#[test]
fn a_walk_over_many_sockets_does_not_keep_the_ring_waiting() {
    if !may_run("a walk over fifty thousand sockets") {
        return;
    }
    let _alone = alone();
    const CONNECTIONS: u32 = 30_000;
    const RING: &str = "131072";
    /// The smallest record is 40 bytes, and 8 of its head in the ring.
    const RECORDS: f64 = 131_072.0 / 48.0;
    const ROUNDS: usize = 10;
    let namespace = Namespace::new();
    let _crowd = Held::crowd(&namespace, AUDITED_PORT, CONNECTIONS);
    let load = Load::start(AUDIT_LOAD_PORT, 1, 100);
    let ports = format!("{AUDITED_PORT},{AUDIT_LOAD_PORT}");
    let mut seen = Vec::new();
    // At full speed two processors have no time for an agent; a busy machine
    // may starve it in a round, but not in all of them.
    let judged = (0..ROUNDS).any(|_| {
        let mut args = vec!["--source", "ebpf", "--filter.loopback", "include"];
        args.extend(["--ports.allow", &ports, "--ebpf.ring-buffer-size", RING]);
        let (changes, started) = (load.changes(), Instant::now());
        let agent = Agent::start(&args);
        let first = agent.scrape();
        let pace = (load.changes() - changes) as f64 / started.elapsed().as_secs_f64();
        let walk = first.sum("connmon_reconcile_duration_seconds", &[]);
        // Each change is a record at either end.
        let records = 2.0 * pace * walk;
        let dropped = first.sum("connmon_events_dropped_total", &[]);
        seen.push(format!(
            "{records:.0} records in {walk} s, {dropped} dropped"
        ));
        load.pause();
        if dropped == 0.0 {
            let gauge = of(&first, "connmon_port_connections", AUDITED_PORT);
            assert_eq!(gauge, 2.0 * f64::from(CONNECTIONS));
        }
        agent.stop();
        load.resume();
        if dropped > 0.0 {
            load.slow_down();
        }
        dropped == 0.0 && records > 1.5 * RECORDS
    });
    println!("{seen:#?}");
    assert!(judged, "no round without a loss: {seen:#?}");
    load.stop();
}
