//! Events folded per core, rows merged per core, and memory per connection.
//!
//! The streams are those of a busy server: half of the connections are inbound,
//! half go out, every remote address is new and is placed by the embedded
//! database, and for each connection that opens the oldest one closes, so that
//! the table stays at its size. Times are CPU times of the thread, since the
//! machines these run on are rarely idle.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use connmon_common::state::*;
use connmon_core::event::{Event, Owner, Socket, Traffic, Tuple};
use connmon_core::fold::{CrossFamilies, Fold, FoldConfig, RemoteFilter};
use connmon_core::geo::{Database, Locator};
use connmon_core::scan::{Access, Row, Trigger, Walk, WalkMessage, WalkSummary};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rustix::time::{ClockId, clock_gettime};

/// Events of one timed stretch: what a ring of 8 MiB holds, about.
const STRETCH: usize = 65_536;

/// Rows of one message, as the walker sends them.
const BATCH_ROWS: usize = 1_024;

const NETNS: u32 = 4_026_531_840;

#[derive(Clone, Copy)]
enum Family {
    V4,
    V6,
}

fn config() -> FoldConfig {
    FoldConfig {
        filter: RemoteFilter {
            exclude_loopback: true,
            exclude: Vec::new(),
        },
        ports_allow: None,
        ports_max: 128,
        cross: CrossFamilies::Off,
        connections_max: 1 << 20,
        listeners: true,
        listeners_max: 512,
        host_netns: NETNS,
        hash_key: *b"sixteen bytes of",
        traffic: true,
        accepts: true,
        polling: false,
    }
}

/// The `n`th connection ever. Of `live` at a time, no two share a kernel
/// address or endpoints; addresses of the kernel and of the world are
/// scattered.
struct Connection {
    socket: Socket,
    tuple: Tuple,
    outbound: bool,
}

impl Connection {
    fn new(n: u32, live: u32, family: Family) -> Self {
        let places = (live + 1).next_power_of_two();
        let place = n.wrapping_mul(0x9e37_79b1) % places;
        let scattered = n.wrapping_mul(0x85eb_ca6b);
        let (local, remote): (IpAddr, IpAddr) = match family {
            Family::V4 => {
                // Between 16.0.0.0 and 126.255.255.255.
                let bits = 0x1000_0000 + scattered % 0x6f00_0000;
                (
                    Ipv4Addr::new(10, 0, 0, 1).into(),
                    Ipv4Addr::from_bits(bits).into(),
                )
            }
            Family::V6 => {
                let high = u128::from(0x2000_0000 | scattered >> 3) << 96;
                let remote = Ipv6Addr::from_bits(high | u128::from(n));
                (Ipv6Addr::from_bits(0xfd00 << 112 | 1).into(), remote.into())
            }
        };
        let outbound = n % 2 == 1;
        let ephemeral = 32_768 + (n % 28_000) as u16;
        let service = [443, 80, 22, 5432][(n / 2 % 4) as usize];
        Self {
            socket: Socket {
                id: 0xffff_8880_0000_0000 + u64::from(place) * 2_304,
                cookie: 0,
                netns: NETNS,
            },
            tuple: Tuple {
                local,
                local_port: if outbound { ephemeral } else { service },
                remote,
                remote_port: if outbound { service } else { ephemeral },
            },
            outbound,
        }
    }

    fn opens(&self, at_ns: u64, out: &mut Vec<Event>) {
        if self.outbound {
            out.push(Event::Connect {
                socket: self.socket,
                at_ns,
                tuple: self.tuple,
                owner: Owner::default(),
            });
        }
        out.push(Event::Open {
            socket: self.socket,
            at_ns: at_ns + 20_000_000,
            tuple: self.tuple,
            old: if self.outbound { SYN_SENT } else { SYN_RECV },
            new: ESTABLISHED,
        });
        if !self.outbound {
            out.push(Event::Accept {
                id: self.socket.id,
                at_ns: at_ns + 20_050_000,
                owner: Owner::default(),
            });
        }
    }

    fn closes(&self, at_ns: u64, out: &mut Vec<Event>) {
        out.push(Event::Change {
            socket: self.socket,
            tuple: self.tuple,
            old: ESTABLISHED,
            new: FIN_WAIT1,
        });
        out.push(Event::Close {
            socket: self.socket,
            at_ns,
            tuple: self.tuple,
            old: FIN_WAIT2,
            error: 0,
            segments_out: Some(7),
            shut_down: false,
            traffic: Some(Traffic {
                received_bytes: 1_000,
                sent_bytes: 20_000,
                retransmitted_segments: 0,
                srtt_us: 12_000,
            }),
        });
    }
}

/// A fold with `live` connections and the stream that keeps it there.
struct Load {
    fold: Fold,
    locator: Locator,
    live: u32,
    next: u32,
    family: Family,
    now: u64,
}

impl Load {
    fn new(database: &Arc<Database>, live: u32, family: Family) -> Self {
        let mut load = Self {
            fold: Fold::new(config()),
            locator: Locator::new(database.clone()),
            live,
            next: 0,
            family,
            now: 1,
        };
        load.grow(live);
        load
    }

    /// Opens connections until there are `wanted`.
    fn grow(&mut self, wanted: u32) {
        let mut events = Vec::new();
        while self.next < wanted {
            Connection::new(self.next, self.live, self.family).opens(self.now, &mut events);
            self.next += 1;
            self.apply(&events);
            events.clear();
        }
    }

    fn stretch(&mut self) -> Vec<Event> {
        let mut events = Vec::with_capacity(STRETCH + 4);
        while events.len() < STRETCH {
            self.now += 10_000;
            Connection::new(self.next.wrapping_sub(self.live), self.live, self.family)
                .closes(self.now, &mut events);
            Connection::new(self.next, self.live, self.family).opens(self.now, &mut events);
            self.next = self.next.wrapping_add(1);
        }
        events
    }

    fn apply(&mut self, events: &[Event]) {
        for event in events {
            self.fold.apply(self.now, event, &mut self.locator);
        }
    }
}

fn events(criterion: &mut Criterion) {
    let database = Arc::new(Database::embedded().expect("the embedded database opens"));
    let mut group = criterion.benchmark_group("fold/events");
    group
        .sample_size(20)
        .measurement_time(Duration::from_secs(3));
    for (name, live, family) in [
        ("10k connections, IPv4", 10_000, Family::V4),
        ("100k connections, IPv4", 100_000, Family::V4),
        ("1M connections, IPv4", 1_000_000, Family::V4),
        ("100k connections, IPv6", 100_000, Family::V6),
        ("1M connections, IPv6", 1_000_000, Family::V6),
    ] {
        let mut load = Load::new(&database, live, family);
        group.throughput(Throughput::Elements(STRETCH as u64));
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    let events = load.stretch();
                    let start = cpu_time();
                    load.apply(black_box(&events));
                    spent += cpu_time() - start;
                }
                spent
            });
        });
        let snapshot = load.fold.snapshot();
        assert_eq!(snapshot.tracked, u64::from(live));
        assert_eq!(
            snapshot.corrections,
            connmon_core::fold::Corrections::default()
        );
    }
    group.finish();
}

/// What a connection costs, everything included. Runs first: memory that
/// another bench gave back would hide what this one takes.
fn memory(_: &mut Criterion) {
    let database = Arc::new(Database::embedded().expect("the embedded database opens"));
    let before = anonymous_bytes();
    let mut load = Load::new(&database, 0, Family::V4);
    for live in [10_000, 100_000, 1_000_000] {
        load.live = 1_000_000;
        load.grow(live);
        let each = (anonymous_bytes() - before) as f64 / f64::from(live);
        println!("{live} connections: {each:.1} bytes of anonymous memory each");
    }
}

/// A startup walk by dumps: every row read twice, traffic in the second pass.
fn merge(criterion: &mut Criterion) {
    let database = Arc::new(Database::embedded().expect("the embedded database opens"));
    let mut group = criterion.benchmark_group("fold/startup merge");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(3));
    for (name, live) in [("100k rows", 100_000), ("1M rows", 1_000_000)] {
        group.throughput(Throughput::Elements(live));
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    let mut fold = Fold::new(config());
                    let mut locator = Locator::new(database.clone());
                    for message in startup(live as u32) {
                        let start = cpu_time();
                        fold.walk(1, message, &mut locator);
                        spent += cpu_time() - start;
                    }
                    let start = cpu_time();
                    while fold.sweep(1) {}
                    spent += cpu_time() - start;
                    assert_eq!(fold.snapshot().corrections.seeded, live);
                }
                spent
            });
        });
    }
    group.finish();
}

fn startup(live: u32) -> impl Iterator<Item = WalkMessage> {
    let begin = WalkMessage::Begin(Walk {
        trigger: Trigger::Startup,
        traffic: true,
        audit: true,
    });
    let namespace = WalkMessage::NamespaceBegin {
        netns: NETNS,
        surrogate: false,
        t0_ns: 1,
        ephemeral: (32_768, 60_999),
    };
    let end = WalkMessage::NamespaceEnd {
        netns: NETNS,
        access: Access::Diag,
        complete: true,
    };
    let batches = (0..live).step_by(BATCH_ROWS).flat_map(move |first| {
        [0, 1].map(|pass| WalkMessage::Rows {
            pass,
            rows: rows(first, live, pass == 1),
        })
    });
    [begin, namespace]
        .into_iter()
        .chain(batches)
        .chain([end, WalkMessage::End(WalkSummary::default())])
}

fn rows(first: u32, live: u32, stats: bool) -> Vec<Row> {
    (first..live.min(first + BATCH_ROWS as u32))
        .map(|n| Row {
            state: ESTABLISHED,
            tuple: Connection::new(n, live, Family::V4).tuple,
            cookie: u64::from(n) + 1,
            inode: 1,
            id: 0,
            receive_queue: 0,
            send_queue: 0,
            traffic: stats.then(Traffic::default),
            owner: Owner::default(),
        })
        .collect()
}

fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// `RssAnon` of this process.
#[expect(clippy::disallowed_methods, reason = "the bench is not the core")]
fn anonymous_bytes() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.trim().parse::<i64>().ok())
        .expect("Linux reports RssAnon in kB")
        * 1_024
}

criterion_group!(benches, memory, events, merge);
criterion_main!(benches);
