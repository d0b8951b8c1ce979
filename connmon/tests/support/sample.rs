//! A report for tests, with something in every field. The unit tests and the
//! browser test show the same one.

use connmon_core::fold::{
    Corrections, CountryRow, Direction, FailureReason, Flow, Histogram, ListenerRow, PortLabel,
    PortRow, Snapshot, Sum,
};
use connmon_core::geo::Country;
use connmon_core::probe::{AttachFailure, Method, Probe, Rung, Stage};
use connmon_core::report::{DatabaseInfo, Report, Source, Status};

const BOUNDS_NS: &[u64] = &[1_000_000, 1_000_000_000];

/// Two countries, a private network; ports 22, 443 and `other`; an agent with
/// every probe, two of them on their second rung.
pub fn report() -> Report {
    Report {
        snapshot: snapshot(),
        status: status(),
    }
}

/// A row of a country with connections and opens by direction.
pub fn country(country: Country, connections: [u64; 3], opened: [u64; 3]) -> CountryRow {
    let mut row = CountryRow {
        country,
        flows: [Flow::default(); 3],
        failures: [0; FailureReason::COUNT],
        connect_latency: Sum::default(),
        rtt: Sum::default(),
    };
    for (direction, flow) in row.flows.iter_mut().enumerate() {
        flow.connections = connections[direction];
        flow.opened = opened[direction];
        flow.closed = opened[direction].saturating_sub(connections[direction]);
    }
    row
}

/// A row of a port.
pub fn port(port: PortLabel, direction: Direction, connections: u64, opened: u64) -> PortRow {
    PortRow {
        port,
        direction,
        flow: Flow {
            connections,
            opened,
            closed: opened.saturating_sub(connections),
            ..Flow::default()
        },
        close_wait: 0,
        failures: (direction == Direction::Outbound).then_some([0; FailureReason::COUNT]),
        accept_wait: (direction == Direction::Inbound).then_some(Sum::default()),
    }
}

fn snapshot() -> Snapshot {
    let mut germany = country(Country::from_code("DE"), [40, 2, 1], [400, 20, 0]);
    germany.flows[0].received_bytes = 1_000_000;
    germany.flows[0].sent_bytes = 25_000_000;
    germany.flows[0].retransmitted_segments = 7;
    germany.flows[1].received_bytes = 9_000;
    germany.flows[1].sent_bytes = 3_000;
    germany.failures[FailureReason::Refused as usize] = 5;
    germany.connect_latency = Sum {
        count: 20,
        sum_ns: 250_000_000,
    };
    germany.rtt = Sum {
        count: 22,
        sum_ns: 400_000_000,
    };
    let mut japan = country(Country::from_code("JP"), [0, 10, 0], [0, 70, 0]);
    japan.flows[1].received_bytes = 5_000_000;
    japan.flows[1].sent_bytes = 800_000;
    japan.failures[FailureReason::Timeout as usize] = 3;
    japan.connect_latency = Sum {
        count: 70,
        sum_ns: 14_000_000_000,
    };

    let mut https_in = port(PortLabel::Port(443), Direction::Inbound, 40, 400);
    https_in.flow.received_bytes = 1_000_000;
    https_in.flow.sent_bytes = 25_000_000;
    https_in.flow.retransmitted_segments = 7;
    https_in.close_wait = 2;
    https_in.accept_wait = Some(Sum {
        count: 400,
        sum_ns: 8_000_000,
    });
    let mut https_out = port(PortLabel::Port(443), Direction::Outbound, 12, 90);
    https_out.flow.received_bytes = 5_009_000;
    https_out.flow.sent_bytes = 803_000;
    if let Some(failures) = &mut https_out.failures {
        failures[FailureReason::Timeout as usize] = 3;
        failures[FailureReason::Refused as usize] = 5;
    }
    Snapshot {
        countries: vec![
            germany,
            japan,
            country(Country::PRIVATE, [12, 0, 0], [30, 0, 0]),
        ],
        ports: vec![
            port(PortLabel::Port(22), Direction::Inbound, 12, 30),
            https_in,
            https_out,
            port(PortLabel::Other, Direction::Inbound, 0, 0),
            port(PortLabel::Other, Direction::Outbound, 0, 0),
            port(PortLabel::Other, Direction::Unknown, 1, 0),
        ],
        cross_enabled: false,
        cross: Vec::new(),
        established: 65,
        audited_states: [0, 0, 0, 3, 2, 0, 0],
        connect_latency: histogram(),
        accept_wait: histogram(),
        rtt: [histogram(), histogram(), histogram()],
        duration: [histogram(), histogram(), histogram()],
        listeners: vec![
            listener("203.0.113.9", 22, "sshd", 700),
            listener("0.0.0.0", 443, "nginx", 800),
            listener("::", 443, "nginx", 800),
        ],
        tracked: 70,
        untracked: 0,
        table_overflow: 0,
        tombstone_overflow: 0,
        series_overflow: vec![("port", 0), ("country_port", 0)],
        series_evicted: vec![("port", 0)],
        folded: 4_321,
        unattributed: 0,
        missed_closes: 0,
        corrections: Corrections {
            seeded: 6,
            ..Corrections::default()
        },
        drift: Some(0),
        drift_suspected: Some(0),
        hidden_loopback: 34,
        hidden_excluded: 2,
        traffic_known: true,
        accept_known: true,
    }
}

fn histogram() -> Histogram {
    Histogram {
        bounds_ns: BOUNDS_NS,
        counts: vec![1, 2, 0],
        sum_ns: 3_000_000,
    }
}

fn listener(address: &str, port: u16, process: &str, pid: u32) -> ListenerRow {
    ListenerRow {
        netns: 4_026_531_840,
        host: true,
        address: address.to_owned(),
        port,
        process: process.to_owned(),
        pid,
        sockets: 1,
        queue_length: 0,
        queue_limit: Some(511),
    }
}

fn status() -> Status {
    Status {
        source: Source::Ebpf,
        degraded: None,
        rungs: vec![
            Rung {
                probe: Probe::SetState,
                method: Method::TpBtf,
                failures: Vec::new(),
            },
            Rung {
                probe: Probe::Connect,
                method: Method::Kprobe,
                failures: refused(Method::Fentry),
            },
            Rung {
                probe: Probe::Accept,
                method: Method::Kretprobe,
                failures: refused(Method::Fexit),
            },
        ],
        up: true,
        ready: true,
        waiting_for: None,
        uptime_s: 75.5,
        events_produced: 4_321,
        events_folded: 4_321,
        dropped_ring_full: 0,
        dropped_undecodable: 0,
        missed_runs: vec![(Probe::SetState, 0)],
        reconcile_runs: [1, 1, 0],
        reconcile_duration_s: 0.004,
        reconcile_interval_s: 60.0,
        namespaces: [3, 0, 0],
        programs: Vec::new(),
        database: DatabaseInfo {
            database_type: "DBIP-Country-Lite".to_owned(),
            source: "embedded",
            build_timestamp: 1_761_955_200,
            reloads_ok: 0,
            reloads_failed: 0,
        },
        demo: false,
    }
}

/// What a kernel without trampolines answers.
fn refused(method: Method) -> Vec<AttachFailure> {
    let message = "load: Operation not permitted (os error 1)";
    vec![AttachFailure {
        errno: Some(1),
        ..AttachFailure::new(method, Stage::Load, message)
    }]
}
