//! The agent restarted under load, stopped until its ring buffer overflows, and
//! with namespaces that end. Afterwards its gauges equal the kernel's tables and
//! its laws hold.
//!
//! `CONNMON_STORM=long` runs each in full length.

use std::net::Shutdown;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::harness::{Agent, Scrape};
use crate::held::Held;
use crate::load::{Load, alone, scale};
use crate::namespaces::may_run;
use crate::traffic::{Family, Pair, Server, ss};

pub const SIGSTOP: i32 = 19;
pub const SIGCONT: i32 = 18;

/// Ports inside namespaces of our own, where they are free; below the
/// ephemeral range.
const RESTART_PORT: u16 = 7101;
const OVERFLOW_PORT: u16 = 7102;
const EVICTION_PORT: u16 = 7103;
const LOST_PORT: u16 = 7104;
const NAMESPACED_PORT: u16 = 7105;
const LOADED_PORTS: [u16; 3] = [7106, 7107, 7108];

/// An agent that counts only these ports by themselves, so that nothing else
/// on the machine takes their place.
pub fn start(ports: &[u16], more: &[&str]) -> Agent {
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    let ports = ports.join(",");
    let mut args = vec!["--source", "ebpf", "--filter.loopback", "include"];
    args.extend(["--ports.allow", &ports]);
    args.extend(more);
    Agent::start(&args)
}

/// Sockets in ESTABLISHED on both sides of a port, as the agent sees it.
pub fn gauge(scrape: &Scrape, port: u16) -> f64 {
    scrape.sum("connmon_port_connections", &[("port", &port.to_string())])
}

pub fn dropped(scrape: &Scrape) -> f64 {
    scrape.sum("connmon_events_dropped_total", &[("reason", "ring_full")])
}

/// Audits that corrected something, seeds aside.
fn corrections(scrape: &Scrape) -> f64 {
    let of = |action| scrape.sum("connmon_reconcile_corrections_total", &[("action", action)]);
    of("added") + of("removed") + of("updated")
}

pub fn audits(scrape: &Scrape) -> f64 {
    scrape.sum("connmon_reconcile_runs_total", &[])
}

/// Waits until an audit, begun after there had been so many, has found nothing
/// to correct.
fn no_drift(agent: &Agent, before: f64) -> Scrape {
    agent.until("no drift", |scrape| {
        // One more may have been under way.
        audits(scrape) >= before + 2.0 && scrape.get("connmon_drift_connections", &[]) == Some(0.0)
    })
}

/// Connections a second during restarts. A debug build does not manage as many
/// on two processors as a release build.
const AIM: f64 = 20_000.0;

#[test]
fn restarts_under_load_start_exact() {
    if !may_run("restarts under load") {
        return;
    }
    let _alone = alone();
    let held = Server::new(Family::V4);
    let pairs = held.pairs(40);
    const CLIENTS: usize = 2;
    let load = Load::start(RESTART_PORT, CLIENTS, scale(2_500, 4_000));
    let ports = [held.port(), load.port()];
    let (mut rounds, mut tries) = (0, 0);
    let wanted = scale(4, 20);
    let (mut opened, mut elapsed) = (0, Duration::ZERO);
    let mut at_speed = 0;
    while rounds < wanted {
        tries += 1;
        assert!(tries <= 3 * wanted, "the load is too fast for any bound");
        let (opened_before, started) = (load.opened(), Instant::now());
        let agent = start(&ports, &[]);
        let before = load.changes();
        let first = agent.scrape();
        let actual = load.established();
        let changed = load.changes() - before;
        let (opened_now, elapsed_now) = (load.opened() - opened_before, started.elapsed());
        opened += opened_now;
        elapsed += elapsed_now;
        let seen = gauge(&first, load.port());
        // Each end of a connection is a socket; what the load's clients are
        // doing right now is not in its count yet.
        let bound = 2.0 * (changed + CLIENTS as u64) as f64;
        if bound >= actual / 4.0 {
            // Proves nothing: this machine took too long for one scrape.
            load.slow_down();
            load.pause();
            agent.stop();
            load.resume();
            continue;
        }
        assert!(
            (seen - actual).abs() <= bound,
            "round {rounds}: {seen} by the agent, {actual} by the kernel, {changed} changes \
             meanwhile, {} events dropped",
            dropped(&first)
        );
        assert_eq!(
            gauge(&first, held.port()),
            80.0,
            "round {rounds}: held ones"
        );
        // Without load it is exact, and not because an audit corrected it.
        load.pause();
        // The kernel may still have resets to deliver.
        let quiet = agent.until("the gauge of a quiet load", |scrape| {
            gauge(scrape, load.port()) == load.established()
        });
        assert_eq!(dropped(&quiet), 0.0, "round {rounds}");
        assert_eq!(corrections(&quiet), 0.0, "round {rounds}");
        agent.check_laws();
        // Half of the rounds end by SIGKILL.
        load.resume();
        if rounds % 2 == 0 {
            agent.kill();
        } else {
            agent.stop();
        }
        rounds += 1;
        at_speed += u32::from(opened_now as f64 >= AIM * elapsed_now.as_secs_f64());
    }
    let agent = start(&ports, &[]);
    let all = load.stop();
    println!(
        "{all} connections under {tries} restarts, {rounds} of them judged, {at_speed} of these \
         at {AIM} a second or more; {:.0} a second while an agent started, on {} CPUs that \
         carried load, agent and whatever else was running",
        opened as f64 / elapsed.as_secs_f64(),
        std::thread::available_parallelism().unwrap()
    );
    // Both ends of what was left are closed by now.
    let last = agent.scrape();
    assert_eq!(gauge(&last, ports[1]), 0.0);
    assert_eq!(gauge(&last, held.port()), 80.0);
    drop(pairs);
    agent.until("the held ones' end", |scrape| {
        gauge(scrape, ports[0]) == 0.0
    });
    agent.stop();
}

#[test]
fn an_overflown_ring_is_counted_and_healed() {
    if !may_run("an overflown ring") {
        return;
    }
    let _alone = alone();
    let server = Server::new(Family::V4);
    let mut pairs = server.pairs(100);
    let load = Load::start(OVERFLOW_PORT, 2, 100);
    let ports = [server.port(), load.port()];
    let agent = start(
        &ports,
        &[
            "--ebpf.ring-buffer-size",
            "65536",
            "--reconcile.interval",
            "2s",
        ],
    );
    agent.until("the seeds", |scrape| gauge(scrape, ports[0]) == 200.0);
    let before = agent.scrape();

    agent.signal(SIGSTOP);
    let until = Instant::now() + scale(Duration::from_secs(2), Duration::from_secs(30));
    // A change is a record of 60 bytes or more at either end: the ring is
    // full by half of these, and all that follows is lost.
    load.until_changed(load.changes() + 1_000);
    pairs.drain(..30).for_each(Pair::close);
    pairs.extend(server.pairs(70));
    let half: Vec<Pair> = pairs.drain(..10).collect();
    for pair in &half {
        pair.client.shutdown(Shutdown::Write).unwrap();
    }
    sleep(until.saturating_duration_since(Instant::now()));
    agent.signal(SIGCONT);

    let healed = agent.until("exact counts on the held port", |scrape| {
        dropped(scrape) > dropped(&before) && gauge(scrape, ports[0]) == 260.0
    });
    assert_eq!(by_kernel(ports[0]), 260.0);
    let runs = healed.sum("connmon_reconcile_runs_total", &[("trigger", "loss")]);
    assert!(runs >= 1.0, "the loss led to no reconcile");

    load.stop();
    // Within two audits from now, and one may be under way.
    let stopped = audits(&agent.scrape());
    let last = agent.until("two audits", |scrape| {
        let equal = gauge(scrape, ports[0]) == 260.0 && gauge(scrape, ports[1]) == 0.0;
        let passed = audits(scrape) - stopped;
        assert!(equal || passed <= 3.0, "not equal after {passed} audits");
        equal && passed >= 2.0
    });
    println!("{} events lost", dropped(&last));
    assert_eq!(
        last.sum("connmon_unattributed_events_total", &[]),
        last.sum("connmon_events_dropped_total", &[])
    );
    no_drift(&agent, stopped);
    assert!(
        last.sum(
            "connmon_reconcile_corrections_total",
            &[("action", "added")]
        ) >= 1.0
    );
    drop(half);
    drop(pairs);
    agent.until("the end of all", |scrape| gauge(scrape, ports[0]) == 0.0);
    agent.stop();
}

/// [`gauge`] as the kernel's socket tables of this namespace have it.
pub fn by_kernel(port: u16) -> f64 {
    (ss("established", "sport", port) + ss("established", "dport", port)) as f64
}

#[test]
fn earlier_namespaces_are_in_the_first_scrape() {
    if !may_run("namespaces of before") {
        return;
    }
    let _alone = alone();
    let (namespaces, connections) = scale((10, 50), (50, 200));
    let mut held: Vec<Held> = (0..namespaces)
        .map(|_| Held::start(NAMESPACED_PORT, connections))
        .collect();
    held.iter_mut().for_each(Held::wait);
    let agent = start(&[NAMESPACED_PORT], &["--reconcile.interval", "1s"]);
    let first = agent.scrape();
    let port = NAMESPACED_PORT.to_string();
    let expected = f64::from(namespaces * connections);
    for direction in ["inbound", "outbound"] {
        let labels = [("port", port.as_str()), ("direction", direction)];
        let seen = first.sum("connmon_port_connections", &labels);
        assert_eq!(seen, expected, "{direction}");
    }
    assert_eq!(
        first.sum("connmon_network_namespaces", &[("access", "unaudited")]),
        0.0
    );
    assert!(first.sum("connmon_network_namespaces", &[("access", "diag")]) > f64::from(namespaces));
    let listening: f64 = first.sum("connmon_listening_socket_info", &[("port", &port)]);
    assert_eq!(listening, f64::from(namespaces), "a listener in each");

    // Half of them end while it runs, with all their connections.
    let kept = held.split_off(held.len() / 2);
    drop(held);
    let ended = audits(&agent.scrape());
    let left = 2.0 * kept.len() as f64 * f64::from(connections);
    agent.until("half of them", |scrape| {
        gauge(scrape, NAMESPACED_PORT) == left
    });
    assert_eq!(gauge(&no_drift(&agent, ended), NAMESPACED_PORT), left);
    drop(kept);
    agent.until("none of them", |scrape| {
        gauge(scrape, NAMESPACED_PORT) == 0.0
    });
    agent.stop();
}

#[test]
fn loaded_namespaces_are_exact_while_one_ends() {
    if !may_run("load in three namespaces") {
        return;
    }
    let _alone = alone();
    let mut loads: Vec<Load> = LOADED_PORTS.map(|port| Load::start(port, 1, 300)).into();
    let mut args = vec!["--reconcile.interval", "1s"];
    // Large enough for what happens while a busy machine does not run the agent.
    args.extend(["--ebpf.ring-buffer-size", "128MiB"]);
    let agent = start(&LOADED_PORTS, &args);
    let compare = |loads: &[Load]| {
        loads.iter().for_each(Load::pause);
        let before = corrections(&agent.scrape());
        // The kernel may still have resets to deliver.
        let scrape = agent.until("the gauges of quiet loads", |scrape| {
            let mut loads = loads.iter();
            loads.all(|load| gauge(scrape, load.port()) == load.established())
        });
        assert_eq!(corrections(&scrape), before, "by events alone");
        loads.iter().for_each(Load::resume);
        scrape
    };
    compare(&loads);
    // Its namespace ends with all its sockets while the others go on.
    let ended = loads.pop().unwrap();
    let port = ended.port();
    drop(ended);
    agent.until("the end of one", |scrape| gauge(scrape, port) == 0.0);
    for load in &loads {
        load.until_changed(load.changes() + 5_000);
    }
    let scrape = compare(&loads);
    assert_eq!(gauge(&scrape, port), 0.0);
    assert_eq!(dropped(&scrape), 0.0, "the ring is large enough for this");
    for load in loads {
        let port = load.port();
        load.stop();
        assert_eq!(gauge(&agent.scrape(), port), 0.0);
    }
    no_drift(&agent, audits(&agent.scrape()));
    agent.stop();
}

#[test]
fn a_namespace_whose_end_is_lost_is_evicted() {
    if !may_run("a namespace whose end is lost") {
        return;
    }
    let _alone = alone();
    let mut held = Held::start(LOST_PORT, 50);
    held.wait();
    let load = Load::start(EVICTION_PORT, 2, 100);
    let agent = start(
        &[LOST_PORT, load.port()],
        &[
            "--ebpf.ring-buffer-size",
            "65536",
            "--reconcile.interval",
            "1s",
        ],
    );
    assert_eq!(gauge(&agent.scrape(), LOST_PORT), 100.0);
    agent.signal(SIGSTOP);
    load.until_changed(load.changes() + 1_000);
    drop(held); // no event is read
    load.until_changed(load.changes() + 1_000);
    agent.signal(SIGCONT);
    let port = load.port();
    load.stop();
    let stopped = audits(&agent.scrape());
    agent.until("its eviction", |scrape| {
        gauge(scrape, LOST_PORT) == 0.0 && gauge(scrape, port) == 0.0
    });
    let last = no_drift(&agent, stopped);
    assert!(dropped(&last) > 0.0, "nothing was lost");
    assert_eq!((gauge(&last, LOST_PORT), gauge(&last, port)), (0.0, 0.0));
    agent.stop();
}
