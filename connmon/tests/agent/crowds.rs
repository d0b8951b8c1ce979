//! Many connections at once: beyond the cap, and under an audit.

use crate::harness::{Agent, Scrape};
use crate::held::Held;
use crate::load::alone;
use crate::namespaces::{Namespace, may_run};
use crate::traffic::{Family, Server};

const SIGSTOP: i32 = 19;
const SIGCONT: i32 = 18;

/// Ports inside namespaces of our own; below the ephemeral range.
const CAPPED_PORT: u16 = 7201;
const AUDITED_PORT: u16 = 7202;

fn of(scrape: &Scrape, family: &str, port: u16) -> f64 {
    scrape.sum(family, &[("port", &port.to_string())])
}

#[test]
fn opens_beyond_the_cap_count_but_are_not_kept() {
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

/// The ring is drained between any two steps of a walk. How long the longest
/// of them takes is a share of all of them, by the CPU time of the thread: a
/// share that neither the speed of the machine nor its load changes.
#[test]
fn a_large_walk_does_not_delay_the_ring_buffer() {
    if !may_run("a walk over sixty thousand sockets") {
        return;
    }
    let _alone = alone();
    const CONNECTIONS: u32 = 30_000;
    let namespace = Namespace::new();
    let _crowd = Held::crowd(&namespace, AUDITED_PORT, CONNECTIONS);
    let port = AUDITED_PORT.to_string();
    let mut args = vec!["--source", "ebpf", "--filter.loopback", "include"];
    args.extend(["--ports.allow", &port, "--log.level", "debug"]);
    args.extend(["--ebpf.ring-buffer-size", "4096"]);
    let agent = Agent::start(&args);
    let gauge = of(&agent.scrape(), "connmon_port_connections", AUDITED_PORT);
    assert_eq!(gauge, 2.0 * f64::from(CONNECTIONS));
    // More than its ring holds: a loss leads to an audit at once.
    let server = Server::new(Family::V4);
    agent.signal(SIGSTOP);
    drop(server.pairs(100));
    agent.signal(SIGCONT);
    agent.until("an audit", |scrape| {
        scrape.sum("connmon_reconcile_runs_total", &[("trigger", "loss")]) >= 1.0
    });
    let log = agent.stop();
    // A message of 512 rows is a step: a walk has 120 of them. While the
    // table is filled, its index grows now and then, which is a step by itself.
    for (trigger, most) in [("Startup", 1.0 / 2.0), ("Loss", 1.0 / 16.0)] {
        let (all, longest) =
            steps(&log, trigger).unwrap_or_else(|| panic!("no walk {trigger} in:\n{log}"));
        println!("{trigger}: {all} µs of CPU time, {longest} of them at most at once");
        assert!(
            longest <= most * all,
            "{trigger}: a step of {longest} µs in {all}"
        );
    }
}

/// (CPU time of all steps, of the longest of them) of the first walk for this
/// reason, microseconds.
fn steps(log: &str, trigger: &str) -> Option<(f64, f64)> {
    let (_, rest) = log.split_once(&format!("walk starts: Walk {{ trigger: {trigger}"))?;
    let (_, rest) = rest.split_once("walk folded in ")?;
    let (all, rest) = rest.split_once(" µs of CPU time, at most ")?;
    let (longest, _) = rest.split_once(" µs of it")?;
    Some((all.parse().ok()?, longest.parse().ok()?))
}
