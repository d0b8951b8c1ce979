//! The agent on this machine's own kernel, against `ss` and against what the
//! test itself did.

use std::net::Shutdown;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::harness::{Agent, Scrape};
use crate::hidden::{HiddenChanges, mount_tracefs};
use crate::load::{alone, inconclusive};
use crate::namespaces::Namespace;
use crate::support;
use crate::surrogates::Nobody;
use crate::traffic::{ClosedPort, Family, Server, ss, ss_open};

const INCLUDE: [&str; 2] = ["--filter.loopback", "include"];

const OPENED: &str = "connmon_port_connections_opened_total";
const CLOSED: &str = "connmon_port_connections_closed_total";

/// The rungs of the state change that this kernel and user can have.
fn sources() -> Vec<Vec<&'static str>> {
    let mut sources = vec![
        [
            &INCLUDE[..],
            &["--source", "proc", "--proc.interval", "100ms"],
        ]
        .concat(),
    ];
    if !rustix::process::geteuid().is_root() {
        support::skipped("eBPF sources", "needs root");
        return sources;
    }
    mount_tracefs();
    sources.push([&INCLUDE[..], &["--source", "ebpf"]].concat());
    sources.push(
        [
            &INCLUDE[..],
            &["--source", "ebpf", "--ebpf.attach", "tracepoint"],
        ]
        .concat(),
    );
    sources
}

fn ebpf() -> Option<Vec<&'static str>> {
    if rustix::process::geteuid().is_root() {
        return Some([&INCLUDE[..], &["--source", "ebpf"]].concat());
    }
    support::skipped("an eBPF test", "needs root");
    None
}

fn both(scrape: &Scrape, port: u16) -> (f64, f64) {
    (
        scrape.connections(port, "inbound"),
        scrape.connections(port, "outbound"),
    )
}

#[test]
fn counts_match_ss_on_every_source_and_family() {
    for args in sources() {
        let before: Vec<(Family, Server)> = Family::ALL
            .map(|family| (family, Server::new(family)))
            .into();
        let seeded: Vec<_> = before.iter().map(|(_, server)| server.pairs(7)).collect();
        let agent = Agent::start(&args);
        for ((family, server), mut pairs) in before.into_iter().zip(seeded) {
            let port = server.port();
            let what = format!("{args:?} {family:?}");
            let first = agent.until(&format!("{what}: 7 seeds"), |scrape| {
                both(scrape, port) == (7.0, 7.0)
            });
            assert_eq!(
                first.port(OPENED, port, "inbound"),
                0.0,
                "{what}: seeds are not opened"
            );
            pairs.extend(server.pairs(5));
            let held = agent.until(&format!("{what}: 12 held"), |scrape| {
                both(scrape, port) == (12.0, 12.0)
            });
            assert_eq!(held.port(OPENED, port, "outbound"), 5.0, "{what}");
            assert_eq!(ss("established", "sport", port), 12, "{what}");
            assert_eq!(ss("established", "dport", port), 12, "{what}");
            // Half-closed ones are not ESTABLISHED on either side.
            let half = pairs.split_off(9);
            for pair in &half {
                pair.client.shutdown(Shutdown::Write).unwrap();
            }
            agent.until(&format!("{what}: 3 half-closed"), |scrape| {
                both(scrape, port) == (9.0, 9.0)
            });
            assert_eq!(ss("established", "sport", port), 9, "{what}");
            half.into_iter().for_each(drop);
            let (fin, rst): (Vec<_>, Vec<_>) = pairs
                .into_iter()
                .enumerate()
                .partition(|(at, _)| at % 2 == 0);
            fin.into_iter().for_each(|(_, pair)| pair.close());
            rst.into_iter().for_each(|(_, pair)| pair.reset());
            let last = agent.until(&format!("{what}: all closed"), |scrape| {
                scrape.port(CLOSED, port, "inbound") == 12.0
                    && scrape.port(CLOSED, port, "outbound") == 12.0
            });
            assert_eq!(both(&last, port), (0.0, 0.0), "{what}");
            assert_eq!(last.port(OPENED, port, "inbound"), 5.0, "{what}");
        }
        agent.stop();
    }
}

/// In a namespace that only the agent watches, so that other tests change none
/// of its counts. The agent must be started inside.
fn alone_in_a_namespace(inside: impl FnOnce() + Send) {
    Namespace::new().run(inside);
}

#[test]
fn refused_connects_are_failures_and_nothing_else() {
    for mut args in sources().into_iter().filter(|args| args.contains(&"ebpf")) {
        args.extend(["--netns", "host"]);
        alone_in_a_namespace(|| refused_are_failures(&args));
    }
}

fn refused_are_failures(args: &[&str]) {
    let agent = Agent::start(args);
    let failures = |scrape: &Scrape| {
        ["port", "country"].map(|of| {
            let family = format!("connmon_{of}_connect_failures_total");
            (
                scrape.sum(&family, &[("reason", "refused")]),
                scrape.sum(&family, &[]),
            )
        })
    };
    assert_eq!(failures(&agent.scrape()), [(0.0, 0.0); 2]);
    for (family, expected) in Family::ALL.into_iter().zip([11.0, 22.0, 33.0]) {
        let closed = ClosedPort::new(family);
        for _ in 0..11 {
            closed.refused();
        }
        let after = agent.scrape();
        assert_eq!(
            failures(&after),
            [(expected, expected); 2],
            "{args:?} {family:?}"
        );
        let refused = after.sum(
            "connmon_country_connect_failures_total",
            &[("country", "loopback"), ("reason", "refused")],
        );
        assert_eq!(refused, expected, "{args:?} {family:?}");
        let port = closed.address().port();
        for name in [OPENED, CLOSED, "connmon_port_connections"] {
            assert_eq!(after.port(name, port, "outbound"), 0.0, "{args:?} {name}");
        }
    }
    // Short successful connects, a listener shut down and RST on unread
    // data are no failures.
    let server = Server::new(Family::V4);
    let port = server.port();
    for _ in 0..20 {
        server.pair().close();
    }
    for _ in 0..5 {
        let mut pair = server.pair();
        std::io::Write::write_all(&mut pair.client, b"unread").unwrap();
        drop(pair.server);
    }
    let unaccepted: Vec<_> = (0..5).map(|_| server.connect()).collect();
    drop(server);
    drop(unaccepted);
    let after = agent.until("all closed", |scrape| {
        scrape.port(CLOSED, port, "outbound") == 30.0
    });
    assert_eq!(failures(&after), [(33.0, 33.0); 2], "{args:?}");
    agent.stop();
}

/// How many, at full speed.
const COUNT: usize = 100_000;

/// Holds every record of all of them even if nothing drains the ring buffer.
const RING_FOR_ALL: &str = "128MiB";

/// A machine that gives the agent no CPU time until its ring buffer is full
/// loses events. Then this checks that the agent has counted them, and tests the
/// exact count with a ring buffer that holds all events.
#[test]
fn a_hundred_thousand_fast_connections_are_exact() {
    let Some(mut args) = ebpf() else { return };
    let _alone = alone();
    args.extend(["--netns", "host"]);
    alone_in_a_namespace(|| {
        let lost = a_hundred_thousand(&args);
        if lost.is_nothing() {
            return;
        }
        inconclusive(
            "a hundred thousand connections at full speed, the ring of its default size",
            &format!("lost and counted: {lost:?}"),
        );
        args.extend(["--ebpf.ring-buffer-size", RING_FOR_ALL]);
        let lost = a_hundred_thousand(&args);
        assert_eq!(lost.ring, 0.0, "the ring holds all events");
        if !lost.is_nothing() {
            inconclusive(
                "a hundred thousand connections at full speed",
                &format!("skipped by the kernel: {lost:?}"),
            );
        }
    });
}

/// What an agent counted as lost, and what this kernel hid from it.
#[derive(Debug)]
struct Lost {
    /// Events that the full ring buffer dropped.
    ring: f64,
    /// Runs of the state program that the kernel skipped. Those of a kretprobe
    /// lose owners, no connections.
    runs: f64,
    /// State changes of the test's sockets that BPF programs cannot see on some
    /// kernels, and that those count nowhere.
    hidden: f64,
    /// Openings and closings that were not counted.
    short: f64,
}

impl Lost {
    fn of(scrape: &Scrape, hidden: &HiddenChanges, port: u16, count: usize) -> Self {
        let both = |family| {
            let of = |direction| scrape.port(family, port, direction);
            of("inbound") + of("outbound")
        };
        // Where a RST was lost, the other end lingers as an orphan for a minute:
        // what the kernel still has is not closed.
        let orphans = ss_open("sport", port) + ss_open("dport", port);
        let counted = both(OPENED) + both(CLOSED) + orphans as f64;
        let state = [("probe", "inet_sock_set_state")];
        Self {
            ring: scrape.sum("connmon_events_dropped_total", &[]),
            runs: scrape.sum("connmon_probe_missed_runs_total", &state),
            hidden: hidden.count(port) as f64,
            short: 4.0 * count as f64 - counted,
        }
    }

    /// The most openings, or closings, of one direction that may be missing.
    fn most(&self) -> f64 {
        2.0 * (self.ring + self.runs) + self.hidden
    }

    fn is_nothing(&self) -> bool {
        self.ring == 0.0 && self.runs == 0.0 && self.short == 0.0
    }
}

/// Every open and close is counted, except those that the agent counted as
/// lost. A lost open also hides its close.
fn a_hundred_thousand(args: &[&str]) -> Lost {
    let agent = Agent::start(args);
    let server = Server::new(Family::V4);
    let port = server.port();
    let hidden = HiddenChanges::record();
    at_full_speed(&server, COUNT);
    drop(server);
    let all = COUNT as f64;
    let scrape = agent.until("every opening and closing but the lost ones", |scrape| {
        let most = Lost::of(scrape, &hidden, port, COUNT).most();
        ["inbound", "outbound"].iter().all(|direction| {
            let opened = scrape.port(OPENED, port, direction);
            let closed = scrape.port(CLOSED, port, direction);
            assert!(
                opened <= all && closed <= all,
                "{direction}: {opened}, {closed}"
            );
            // After a lost RST the other end stays an orphan for a minute: what
            // the kernel still has is not closed, everything else is.
            let side = if *direction == "inbound" {
                "sport"
            } else {
                "dport"
            };
            let orphans = ss_open(side, port) as f64;
            all - opened <= most
                && (0.0..=most).contains(&(all - orphans - closed))
                && scrape.connections(port, direction) == 0.0
        })
    });
    agent.stop();
    Lost::of(&scrape, &hidden, port, COUNT)
}

/// Opens and closes so many, half of them by RST.
fn at_full_speed(server: &Server, count: usize) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..count {
                drop(server.listener.accept().unwrap());
            }
        });
        scope.spawn(|| {
            let mut held = std::collections::VecDeque::new();
            for at in 0..count {
                let client = socket2::Socket::from(server.connect());
                if at % 2 == 0 {
                    client.set_linger(Some(Duration::ZERO)).unwrap();
                }
                held.push_back(client);
                if held.len() > 16 {
                    held.pop_front();
                }
            }
        });
    });
}

/// The kernel skips the program of the classic tracepoint in an interrupt that
/// comes while it runs on that CPU, and counts such recursion misses since 6.7
/// only. connmon's second program cannot replace them but counts them.
#[test]
fn losses_of_the_tracepoint_are_counted_and_healed() {
    let Some(mut args) = ebpf() else { return };
    mount_tracefs();
    let _alone = alone();
    args.extend(["--ebpf.attach", "tracepoint", "--netns", "host"]);
    alone_in_a_namespace(|| {
        let agent = Agent::start(&args);
        let server = Server::new(Family::V4);
        let port = server.port();
        const COUNT: usize = 30_000;
        let hidden = HiddenChanges::record();
        at_full_speed(&server, COUNT);
        drop(server);
        let scrape = agent.until("every opening and closing but the lost ones", |scrape| {
            let state = [("probe", "inet_sock_set_state")];
            let missed = scrape.get("connmon_probe_missed_runs_total", &state);
            missed.expect("it is counted on every kernel");
            let lost = Lost::of(scrape, &hidden, port, COUNT);
            // The close of a connection whose open was missed is not counted
            // either, unless an audit has found it meanwhile.
            both(scrape, port) == (0.0, 0.0) && (0.0..=lost.most()).contains(&lost.short)
        });
        println!("{:?}", Lost::of(&scrape, &hidden, port, COUNT));
        agent.stop();
    });
}

#[test]
fn a_scrape_shows_what_happened_just_before_it() {
    let Some(args) = ebpf() else { return };
    let agent = Agent::start(&args);
    let server = Server::new(Family::V4);
    for count in 1..=20 {
        let held = server.pairs(count);
        let expected = (count as f64, count as f64);
        assert_eq!(both(&agent.scrape(), server.port()), expected);
        drop(held);
        agent.until("all closed", |scrape| {
            both(scrape, server.port()) == (0.0, 0.0)
        });
    }
    agent.stop();
}

#[test]
fn sigterm_and_sigint_end_it_cleanly_within_a_second() {
    for signal in [15, 2] {
        // Other tests load the machine; the best of a few is the agent's own.
        let best = (0..5).map(|_| ending(signal)).min().unwrap();
        assert!(best < Duration::from_secs(1), "{best:?}");
    }
}

/// How long an agent takes to end after a signal.
fn ending(signal: i32) -> Duration {
    let mut agent = Agent::start(&INCLUDE);
    agent.check_laws();
    // A client that never finishes its request must not hold it up.
    let mut slow = std::net::TcpStream::connect(agent.address()).unwrap();
    std::io::Write::write_all(&mut slow, b"GET /metrics HT").unwrap();
    let asked = Instant::now();
    agent.signal(signal);
    assert_eq!(agent.wait().code(), Some(0), "{}", agent.log());
    asked.elapsed()
}

fn refusal(args: &[&str]) -> (Option<i32>, String) {
    let output = Agent::binary()
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn a_taken_port_and_a_bad_database_are_one_clear_line() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, printed) = refusal(&["--web.listen-address", &address]);
    assert_eq!(code, Some(1), "{printed}");
    assert!(printed.contains(&address), "{printed}");
    assert_eq!(printed.lines().count(), 1, "{printed}");

    let (code, printed) = refusal(&["--geoip.database", "/no/such.mmdb"]);
    assert_eq!(code, Some(1), "{printed}");
    assert!(
        printed.contains("--geoip.database") && printed.contains("/no/such.mmdb"),
        "{printed}"
    );
    assert_eq!(printed.lines().count(), 1, "{printed}");
}

#[test]
fn without_privileges_it_polls_or_refuses() {
    if ebpf().is_none() {
        return;
    }
    let nobody = Nobody::new("e2e", "");
    let output = nobody
        .command()
        .args(["--source", "ebpf", "--web.listen-address", "127.0.0.1:0"])
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert!(printed.contains("CAP_BPF"), "names the remedy: {printed}");
    assert_eq!(printed.lines().count(), 1, "{printed}");

    let server = Server::new(Family::V4);
    let held = server.pairs(4);
    let mut command = nobody.command();
    command.args(INCLUDE).args(["--proc.interval", "100ms"]);
    let agent = Agent::spawn(command);
    assert!(agent.log().contains("CAP_BPF"), "{}", agent.log());
    let scrape = agent.scrape();
    assert_eq!(both(&scrape, server.port()), (4.0, 4.0));
    assert_eq!(
        scrape.sum("connmon_source_info", &[("source", "proc")]),
        1.0
    );
    // At this pace a busy machine misses a poll now and then.
    agent.until("a recent poll", |scrape| {
        scrape.get("connmon_up", &[]) == Some(1.0)
    });
    drop(held);
    agent.stop();
}

#[test]
fn a_panic_in_any_thread_ends_the_process() {
    for thread in ["fold", "serve"] {
        let mut command = Agent::binary();
        command.args(INCLUDE).env("CONNMON_TEST_PANIC", thread);
        let mut agent = Agent::spawn(command);
        // These hooks fire on the first report.
        let _ = crate::harness::get(agent.address(), "/metrics");
        assert_eq!(agent.wait().code(), Some(101), "{thread}: {}", agent.log());
        assert!(
            agent.log().contains("rather than serving stale numbers"),
            "{thread}: {}",
            agent.log()
        );
    }
    // The walker's fires at once.
    let output = Agent::binary()
        .args(["--web.listen-address", "127.0.0.1:0"])
        .env("CONNMON_TEST_PANIC", "walker")
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(101), "{log}");
    assert!(log.contains("rather than serving stale numbers"), "{log}");
}

#[test]
fn the_log_starts_with_the_summary_and_the_url() {
    let server = Server::new(Family::V4);
    let held = server.pairs(2);
    let agent = Agent::start(&[]);
    let log = agent.log();
    assert!(
        log.contains("watching ")
            && log.contains("loopback hidden, --filter.loopback include shows them"),
        "{log}"
    );
    assert!(
        log.contains(&format!("http://{}/", agent.address())),
        "{log}"
    );
    let scrape = agent.scrape();
    assert_eq!(
        both(&scrape, server.port()),
        (0.0, 0.0),
        "loopback is left out"
    );
    drop(held);
    agent.stop();
}

#[test]
fn killed_and_restarted_it_finds_everything_again() {
    let Some(args) = ebpf() else { return };
    let server = Server::new(Family::V4);
    let mut held = server.pairs(50);
    for _ in 0..3 {
        let agent = Agent::start(&args);
        held.extend(server.pairs(10));
        let count = held.len() as f64;
        let scrape = agent.scrape();
        assert_eq!(both(&scrape, server.port()), (count, count));
        agent.kill();
    }
}
