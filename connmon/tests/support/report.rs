//! Reports to render: one with every family, and ones of any size.

use connmon_core::fold::{
    Corrections, CountryRow, CrossRow, DIRECTIONS, Direction, FailureReason, Flow, Histogram,
    ListenerRow, PortLabel, PortRow, Snapshot, Sum,
};
use connmon_core::geo::Country;
use connmon_core::probe::{Method, Probe, Rung};
use connmon_core::report::{DatabaseInfo, ProgramStats, Report, Source, Status};

/// The contract's latency buckets, nanoseconds.
const LATENCY_NS: &[u64] = &[
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
    30_000_000_000,
];

/// The contract's duration buckets, nanoseconds.
const DURATION_NS: &[u64] = &[
    1_000_000,
    10_000_000,
    100_000_000,
    1_000_000_000,
    5_000_000_000,
    15_000_000_000,
    60_000_000_000,
    300_000_000_000,
    900_000_000_000,
    3_600_000_000_000,
    14_400_000_000_000,
    86_400_000_000_000,
];

/// How much is in a report.
#[derive(Clone, Copy)]
pub struct Size {
    pub countries: usize,
    pub ports: u16,
    pub cross: usize,
    pub listeners: u16,
}

/// A report of that size, every optional part present.
pub fn report(size: Size) -> Report {
    Report {
        snapshot: snapshot(size),
        status: status(),
    }
}

fn snapshot(size: Size) -> Snapshot {
    Snapshot {
        countries: countries(size.countries),
        ports: ports(size.ports),
        cross_enabled: size.cross > 0,
        cross: cross(size.cross),
        established: 42,
        audited_states: [1, 2, 3, 4, 5, 6, 7],
        connect_latency: histogram(LATENCY_NS),
        accept_wait: histogram(LATENCY_NS),
        rtt: std::array::from_fn(|_| histogram(LATENCY_NS)),
        duration: std::array::from_fn(|_| histogram(DURATION_NS)),
        listeners: (0..size.listeners).map(listener).collect(),
        tracked: 60,
        untracked: 1,
        table_overflow: 2,
        tombstone_overflow: 3,
        series_overflow: vec![("country_port", 3), ("listener", 4), ("port", 5)],
        series_evicted: vec![("country_port", 6), ("port", 7)],
        folded: 1_000,
        unattributed: 8,
        missed_closes: 3,
        corrections: Corrections {
            seeded: 9,
            added: 10,
            removed: 11,
            updated: 12,
        },
        drift: Some(13),
        drift_suspected: Some(4),
        hidden_loopback: 0,
        hidden_excluded: 0,
        traffic_known: true,
        accept_known: true,
    }
}

fn flow(seed: u64) -> Flow {
    Flow {
        connections: seed,
        opened: seed * 10,
        closed: seed * 9,
        received_bytes: seed * 1_000_003,
        sent_bytes: seed * 20_000_017,
        retransmitted_segments: seed / 2,
    }
}

fn sum(seed: u64) -> Sum {
    Sum {
        count: seed,
        sum_ns: seed * 1_234_567,
    }
}

fn failures(seed: u64) -> [u64; FailureReason::COUNT] {
    std::array::from_fn(|reason| seed + reason as u64)
}

fn countries(count: usize) -> Vec<CountryRow> {
    (0..count)
        .map(|index| {
            let seed = index as u64 + 1;
            CountryRow {
                country: Country::from_index(index).unwrap(),
                flows: std::array::from_fn(|direction| flow(seed * 3 + direction as u64)),
                failures: failures(seed),
                connect_latency: sum(seed),
                rtt: sum(seed + 1),
            }
        })
        .collect()
}

/// `count` ports and `other` inbound and outbound, and `other` unknown.
fn ports(count: u16) -> Vec<PortRow> {
    let mut rows = Vec::new();
    for direction in Direction::ALL {
        let named = if direction == Direction::Unknown {
            0
        } else {
            count
        };
        let labels = (0..named)
            .map(|n| PortLabel::Port(60_000 + n))
            .chain([PortLabel::Other]);
        rows.extend(labels.zip(1..).map(|(port, seed)| PortRow {
            port,
            direction,
            flow: flow(seed),
            close_wait: seed,
            failures: (direction == Direction::Outbound).then(|| failures(seed)),
            accept_wait: (direction == Direction::Inbound).then(|| sum(seed)),
        }));
    }
    rows
}

fn cross(count: usize) -> Vec<CrossRow> {
    (0..count)
        .map(|index| CrossRow {
            country: Country::from_index(index % Country::COUNT).unwrap(),
            port: PortLabel::Port((index / Country::COUNT) as u16 + 1),
            direction: Direction::ALL[index % DIRECTIONS],
            connections: index as u64,
            opened: 2 * index as u64,
        })
        .collect()
}

fn histogram(bounds_ns: &'static [u64]) -> Histogram {
    Histogram {
        bounds_ns,
        counts: (0..=bounds_ns.len() as u64).collect(),
        sum_ns: 123_456_789,
    }
}

fn listener(index: u16) -> ListenerRow {
    ListenerRow {
        netns: 4_026_531_840 + u32::from(index % 2),
        host: index.is_multiple_of(2),
        address: if index.is_multiple_of(3) {
            "::"
        } else {
            "10.0.0.1"
        }
        .to_owned(),
        port: index + 1,
        process: format!("worker-{index}"),
        pid: 1_000 + u32::from(index),
        sockets: 1 + u32::from(index % 4),
        queue_length: 0,
        queue_limit: Some(4_096),
    }
}

fn status() -> Status {
    let rung = |probe, method| Rung {
        probe,
        method,
        failures: Vec::new(),
    };
    Status {
        source: Source::Ebpf,
        degraded: None,
        rungs: vec![
            rung(Probe::SetState, Method::TpBtf),
            rung(Probe::Connect, Method::Kprobe),
            rung(Probe::Accept, Method::None),
        ],
        up: true,
        ready: true,
        waiting_for: None,
        uptime_s: 1.5,
        events_produced: 1_003,
        events_folded: 1_000,
        dropped_ring_full: 2,
        dropped_undecodable: 1,
        missed_runs: vec![(Probe::SetState, 0), (Probe::Accept, 14)],
        reconcile_runs: [1, 20, 3],
        reconcile_duration_s: 0.012_345,
        reconcile_interval_s: 60.0,
        namespaces: [4, 1, 2],
        programs: vec![ProgramStats {
            program: "inet_sock_set_state".to_owned(),
            runs: 1_500,
            run_time_ns: 225_000,
        }],
        database: DatabaseInfo {
            database_type: "DBIP-Country-Lite".to_owned(),
            source: "embedded",
            build_timestamp: 1_761_955_200,
            reloads_ok: 15,
            reloads_failed: 16,
        },
        demo: true,
    }
}
