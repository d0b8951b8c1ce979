//! The kernel's iterator over sockets, which the first walk reads where it
//! shows each socket once.

use std::collections::{BTreeMap, VecDeque};
use std::io::Read as _;
use std::sync::atomic::{AtomicBool, Ordering};

use connmon::config::AttachChoice;
use connmon::event::{Event, LiveSocket, decode_live};
use connmon::kernel::{SocketIterator, Tracer, TracerOptions, kernel_version};
use connmon_common::state::ESTABLISHED;
use rustix::thread::UnshareFlags;

use crate::network::{Sysctl, ip};
use crate::scenarios::listen;
use crate::traffic::{Family, Server};
use crate::world::{Outcome, World};

/// Both ends of a connection, by the cookies that their closes carry.
pub fn iterator(world: &mut World<'_>) -> Outcome {
    let mut tracer = tracer();
    let sockets = match iterator_of(&mut tracer) {
        Ok(sockets) => sockets,
        Err(reason) => return Outcome::NotApplicable(reason),
    };
    let server = listen(world, Family::V4);
    let mut pair = server.pair();
    pair.exchange(1000, 500);
    let mut found = Vec::new();
    for socket in read(&sockets) {
        let ports = [socket.tuple.local_port, socket.tuple.remote_port];
        if ports.contains(&server.port()) {
            assert_eq!(socket.state, ESTABLISHED);
            let traffic = socket.traffic.unwrap();
            let moved = (traffic.sent_bytes, traffic.received_bytes);
            let is_server = ports[0] == server.port();
            assert_eq!(moved, if is_server { (500, 1000) } else { (1000, 500) });
            found.push(socket.cookie);
        }
    }
    assert_eq!(found.len(), 2);
    pair.close();
    let mut closed = Vec::new();
    tracer.drain(usize::MAX, |event| {
        if let Event::Close { socket, tuple, .. } = event
            && [tuple.local_port, tuple.remote_port].contains(&server.port())
        {
            closed.push(socket.cookie);
        }
    });
    found.sort_unstable();
    closed.sort_unstable();
    assert_eq!(closed, found);
    Outcome::Held
}

/// Few buckets, so that reads end within one, and sockets that come and go in
/// all of them: what goes on by counting skips some then.
pub fn once(_world: &mut World<'_>) -> Outcome {
    const HELD: usize = 1_000;
    const READINGS: usize = 30;
    let mut tracer = tracer();
    let sockets = match iterator_of(&mut tracer) {
        Ok(sockets) => sockets,
        Err(reason) => return Outcome::NotApplicable(reason),
    };
    // A namespace of this thread alone, and of those that it starts.
    let buckets = Sysctl::set("ipv4/tcp_child_ehash_entries", "16");
    let buckets = match buckets {
        Ok(buckets) => buckets,
        Err(reason) => return Outcome::NotApplicable(reason),
    };
    let inside = || {
        #[expect(unsafe_code, reason = "the only way to get a network namespace")]
        // SAFETY: no file descriptors are unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        ip(&["link", "set", "lo", "up"]).unwrap();
        let server = Server::new(Family::V4);
        let held = server.pairs(HELD);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let churning = scope.spawn(|| churn(&stop));
            // Ends the other thread also when an assertion fails.
            let readings = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for reading in 0..READINGS {
                    let mut seen = BTreeMap::new();
                    for socket in read(&sockets) {
                        let ports = (socket.tuple.local_port, socket.tuple.remote_port);
                        *seen.entry(ports).or_insert(0) += 1;
                    }
                    for pair in &held {
                        let port = pair.client.local_addr().unwrap().port();
                        for ends in [(port, server.port()), (server.port(), port)] {
                            assert_eq!(seen.get(&ends), Some(&1), "reading {reading}: {ends:?}");
                        }
                    }
                }
            }));
            stop.store(true, Ordering::Relaxed);
            let churned = churning.join().unwrap();
            readings.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            assert!(churned > READINGS, "{churned} connections came and went");
        });
    };
    let ended = std::thread::scope(|scope| scope.spawn(inside).join());
    drop(buckets);
    ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    Outcome::Held
}

/// Connections that come and go, a few hundred at a time, until told to stop;
/// how many there were.
fn churn(stop: &AtomicBool) -> usize {
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

/// Kernels of before 6.17 have it where their maintainers took the change
/// over, as Debian's 6.1 and 6.12 have.
fn iterator_of(tracer: &mut Tracer) -> Result<SocketIterator, String> {
    let sockets = tracer.take_socket_iterator();
    assert!(sockets.is_some() || kernel_version() < (6, 17));
    sockets.ok_or_else(|| "iter/tcp of this kernel may skip sockets".into())
}

fn read(sockets: &SocketIterator) -> Vec<LiveSocket> {
    let mut series = Vec::new();
    sockets.open().unwrap().read_to_end(&mut series).unwrap();
    let (mut rest, mut found) = (&series[..], Vec::new());
    while let Some((socket, length)) = decode_live(rest).unwrap() {
        rest = &rest[length..];
        found.push(socket);
    }
    assert!(rest.is_empty());
    found
}
