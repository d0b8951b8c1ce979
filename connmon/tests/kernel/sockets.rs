//! The walk over the kernel's table of sockets, which the first merge reads.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use connmon_common::state::ESTABLISHED;
use connmon_core::event::{Event, LiveSocket};
use connmon_host::kernel::AttachChoice;
use connmon_host::kernel::{SocketWalk, Tracer, TracerOptions};
use rustix::process::{Resource, getrlimit, setrlimit};
use rustix::thread::UnshareFlags;

use crate::harness::PATIENCE;
use crate::network::{Sysctl, ip};
use crate::scenarios::listen;
use crate::traffic::{Family, Server};
use crate::world::{Outcome, World};

/// Both ends of a connection, with statistics, and what their closes report.
pub fn walk(world: &mut World<'_>) -> Outcome {
    let mut tracer = tracer();
    let mut walk = tracer.socket_walk().unwrap();
    let server = listen(world, Family::V4);
    let mut pair = server.pair();
    pair.exchange(1000, 500);
    let mut found = Vec::new();
    for socket in read(&mut walk) {
        let ports = [socket.tuple.local_port, socket.tuple.remote_port];
        if ports.contains(&server.port()) {
            assert_eq!(socket.state, ESTABLISHED);
            let traffic = socket.traffic.unwrap();
            let is_server = ports[0] == server.port();
            let moved = (traffic.sent_payload(!is_server), traffic.received_bytes);
            assert_eq!(moved, if is_server { (500, 1000) } else { (1000, 500) });
            found.push(format!("{:?}", socket.tuple));
        }
    }
    assert_eq!(found.len(), 2);
    pair.close();
    let mut closed = Vec::new();
    let until = Instant::now() + PATIENCE;
    while closed.len() < 2 && Instant::now() < until {
        tracer.drain(usize::MAX, |event| {
            if let Event::Close { tuple, .. } = event
                && [tuple.local_port, tuple.remote_port].contains(&server.port())
            {
                closed.push(format!("{tuple:?}"));
            }
        });
        std::thread::sleep(Duration::from_millis(5));
    }
    found.sort_unstable();
    closed.sort_unstable();
    assert_eq!(closed, found);
    Outcome::Held
}

/// Sockets that come and go in every chain: one that stays is in each reading.
/// (A dump that goes on by counting skips some of them.)
pub fn churn(_world: &mut World<'_>) -> Outcome {
    const HELD: usize = 1_000;
    const READINGS: usize = 100;
    /// A descriptor for each end, and for those that come and go.
    const DESCRIPTORS: u64 = 4_000;
    let limit = getrlimit(Resource::Nofile);
    let mut raised = limit;
    let wanted = DESCRIPTORS.min(limit.maximum.unwrap_or(u64::MAX));
    raised.current = limit.current.map(|current| current.max(wanted));
    setrlimit(Resource::Nofile, raised).unwrap();
    let mut walk = tracer().socket_walk().unwrap();
    // Where the kernel has tables of namespaces, one of few buckets (6.1).
    let buckets = Sysctl::set("ipv4/tcp_child_ehash_entries", "128").ok();
    let inside = || {
        #[expect(unsafe_code, reason = "the only way to get a network namespace")]
        // SAFETY: no file descriptors are unshared. The namespace is that of
        // this thread alone, and of those that it starts.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        ip(&["link", "set", "lo", "up"]).unwrap();
        let server = Server::new(Family::V4);
        let held = server.pairs(HELD);
        let ends: Vec<(u16, u16)> = held
            .iter()
            .map(|pair| pair.client.local_addr().unwrap().port())
            .flat_map(|port| [(port, server.port()), (server.port(), port)])
            .collect();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let churning = scope.spawn(|| come_and_go(&stop));
            // Ends the other thread also when an assertion fails.
            let readings = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for reading in 0..READINGS {
                    let seen: BTreeSet<(u16, u16)> = read(&mut walk)
                        .iter()
                        .filter(|socket| socket.state == ESTABLISHED)
                        .map(|socket| (socket.tuple.local_port, socket.tuple.remote_port))
                        .collect();
                    for end in &ends {
                        assert!(seen.contains(end), "reading {reading}: {end:?}");
                    }
                }
            }));
            stop.store(true, Ordering::Relaxed);
            let count = churning.join().unwrap();
            readings.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            assert!(count > READINGS, "{count} connections came and went");
        });
    };
    let ended = std::thread::scope(|scope| scope.spawn(inside).join());
    drop(buckets);
    setrlimit(Resource::Nofile, limit).unwrap();
    ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    Outcome::Held
}

/// Connections that come and go, some hundred at a time, until asked to stop;
/// how many there were.
fn come_and_go(stop: &AtomicBool) -> usize {
    let server = Server::new(Family::V4);
    let (mut recent, mut count) = (VecDeque::new(), 0);
    while !stop.load(Ordering::Relaxed) {
        recent.push_back(server.pair());
        if recent.len() > 300
            && let Some(oldest) = recent.pop_front()
        {
            oldest.reset();
        }
        count += 1;
    }
    count
}

fn tracer() -> Tracer {
    Tracer::attach(&TracerOptions {
        attach: AttachChoice::Tracepoint,
        ring_buffer_bytes: 1 << 20,
        drop_loopback: false,
        only_netns: None,
        owners: false,
        traffic: true,
        log_level: log::LevelFilter::Info,
    })
    .unwrap()
}

fn read(walk: &mut SocketWalk) -> Vec<LiveSocket> {
    let mut found = Vec::new();
    let whole = walk.read(|socket| {
        found.push(socket);
        true
    });
    assert!(whole.unwrap());
    found
}
