//! What each event does.

use super::*;

const US: &str = "198.51.100.7:443";

#[test]
fn an_active_open_is_outbound_from_birth_to_close() {
    let mut bench = Bench::new(config());
    let tuple = tuple(40000, US);
    bench.connect(1, tuple);
    assert!(bench.fold.snapshot().countries.is_empty());
    assert_eq!(bench.fold.snapshot().tracked, 0);
    bench.now += 30 * MS;
    bench.open(1, tuple, SYN_SENT, ESTABLISHED);
    let row = bench.country("US");
    let flow = row.flows[Direction::Outbound as usize];
    assert_eq!((flow.connections, flow.opened, flow.closed), (1, 1, 0));
    assert_eq!(
        row.connect_latency,
        Sum {
            count: 1,
            sum_ns: 30 * MS
        }
    );
    assert_eq!(
        bench.fold.snapshot().connect_latency.sum_ns,
        u128::from(30 * MS)
    );
    bench.now += 2 * S;
    bench.change(1, tuple, FIN_WAIT1);
    let flow = bench.country("US").flows[1];
    assert_eq!((flow.connections, flow.closed), (0, 0));
    assert_eq!(bench.fold.snapshot().tracked, 1);
    bench.close(1, tuple, FIN_WAIT2);
    let port = bench.port(443, Direction::Outbound).unwrap();
    assert_eq!(
        (port.flow.connections, port.flow.opened, port.flow.closed),
        (0, 1, 1)
    );
    assert_eq!(bench.fold.snapshot().duration[1].sum_ns, u128::from(2 * S));
    assert_eq!(bench.fold.snapshot().tracked, 0);
    assert_eq!(bench.atlas.lookups, 1, "one lookup per connection");
}

#[test]
fn a_passive_open_is_inbound_and_its_accept_wait_is_observed_once() {
    let mut bench = Bench::new(config());
    let tuple = tuple(22, "203.0.113.9:50000");
    bench.open(5, tuple, SYN_RECV, ESTABLISHED);
    bench.now += 3 * MS;
    bench.accept(5);
    bench.now += 3 * MS;
    bench.accept(5);
    let port = bench.port(22, Direction::Inbound).unwrap();
    assert_eq!(
        port.accept_wait,
        Some(Sum {
            count: 1,
            sum_ns: 3 * MS
        })
    );
    assert_eq!(port.failures, None);
    bench.close(5, tuple, ESTABLISHED);
    assert_eq!(bench.country("DE").flows[0].closed, 1);
}

#[test]
fn fast_open_accepted_before_its_handshake_waited_zero() {
    let mut bench = Bench::new(config());
    let tuple = tuple(443, "203.0.113.9:50000");
    bench.accept(5);
    bench.now += 30 * MS;
    bench.open(5, tuple, SYN_RECV, CLOSE_WAIT);
    let port = bench.port(443, Direction::Inbound).unwrap();
    assert_eq!(
        port.accept_wait,
        Some(Sum {
            count: 1,
            sum_ns: 0
        })
    );
    assert_eq!(
        (port.flow.opened, port.flow.connections),
        (1, 0),
        "never ESTABLISHED"
    );
    assert_eq!(bench.fold.snapshot().tracked, 1);
    bench.close(5, tuple, LAST_ACK);
    assert_eq!(bench.port(443, Direction::Inbound).unwrap().flow.closed, 1);
    // A child that never completes takes its early accept with it.
    bench.accept(6);
    bench.close(6, tuple, SYN_RECV);
    bench.open(6, tuple, SYN_RECV, ESTABLISHED);
    let port = bench.port(443, Direction::Inbound).unwrap();
    assert_eq!(port.accept_wait.unwrap().count, 1);
}

#[test]
fn a_deferred_connect_starts_when_its_syn_leaves() {
    let mut bench = Bench::new(config());
    let tuple = tuple(40000, US);
    bench.connect(1, tuple);
    bench.now += 10 * S;
    let at_ns = bench.now;
    bench.apply(Event::ConnectSent {
        id: 1,
        at_ns,
        owner: Owner::default(),
    });
    bench.now += 5 * MS;
    bench.open(1, tuple, SYN_SENT, ESTABLISHED);
    assert_eq!(bench.country("US").connect_latency.sum_ns, 5 * MS);
}

#[test]
fn a_simultaneous_open_stays_active() {
    let mut bench = Bench::new(config());
    let tuple = tuple(40000, US);
    bench.connect(1, tuple);
    bench.now += MS;
    bench.open(1, tuple, SYN_RECV, ESTABLISHED);
    assert_eq!(bench.country("US").flows[1].opened, 1);
    assert_eq!(bench.country("US").connect_latency.count, 1);
    // A child that reuses the address of a connect whose close was missed is
    // inbound all the same.
    bench.connect(2, tuple);
    bench.open(
        2,
        super::tuple(80, "203.0.113.9:1234"),
        SYN_RECV,
        ESTABLISHED,
    );
    assert_eq!(bench.country("DE").flows[0].opened, 1);
    assert_eq!(bench.country("DE").connect_latency.count, 0);
    // A connect that ended without an event was no connection.
    assert_eq!(bench.fold.missed_closes(), 0);
}

#[test]
fn a_reused_socket_address_counts_a_missed_close() {
    let mut bench = Bench::new(config());
    let (first, second) = (tuple(40000, US), tuple(40001, US));
    bench.open(1, first, SYN_SENT, ESTABLISHED);
    bench.open(1, second, SYN_SENT, ESTABLISHED);
    assert_eq!(bench.fold.missed_closes(), 1);
    let flow = &bench.country("US").flows[1];
    assert_eq!((flow.opened, flow.closed, flow.connections), (2, 1, 1));
}

#[test]
fn opens_without_a_connect_tell_their_direction_by_the_state_left() {
    let mut bench = Bench::new(config());
    bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
    bench.open(2, tuple(80, US), SYN_RECV, ESTABLISHED);
    let row = bench.country("US");
    assert_eq!((row.flows[0].opened, row.flows[1].opened), (1, 1));
    assert_eq!(row.connect_latency.count, 0);
}

#[test]
fn failures_count_with_their_reason_and_nothing_else() {
    let mut bench = Bench::new(config());
    let cases = [
        (111, Some(1), FailureReason::Refused),
        (110, Some(7), FailureReason::Timeout),
        (104, Some(1), FailureReason::Reset),
        (113, Some(1), FailureReason::HostUnreachable),
        (101, Some(1), FailureReason::NetworkUnreachable),
        (103, Some(1), FailureReason::Aborted),
        (0, Some(1), FailureReason::Aborted),
        (0, None, FailureReason::Aborted),
        (0, Some(0), FailureReason::Local),
        (99, Some(1), FailureReason::Other),
    ];
    for (id, (error, segments, reason)) in (1..).zip(cases) {
        let tuple = tuple(40000, US);
        bench.connect(id, tuple);
        let before = bench
            .fold
            .snapshot()
            .countries
            .first()
            .map_or(0, |row| row.failures[reason as usize]);
        bench.close_with(id, 0, tuple, SYN_SENT, error, segments, None);
        assert_eq!(
            bench.country("US").failures[reason as usize],
            before + 1,
            "{error}"
        );
    }
    let snapshot = bench.fold.snapshot();
    assert_eq!(bench.country("US").flows, [Flow::default(); 3]);
    assert_eq!(snapshot.tracked, 0);
    let row = bench.port(443, Direction::Outbound).unwrap();
    assert_eq!(
        row.failures.unwrap().iter().sum::<u64>(),
        cases.len() as u64
    );
    assert_eq!(row.flow, Flow::default());
    let other = bench.other(Direction::Outbound).failures.unwrap();
    assert_eq!(other.iter().sum::<u64>(), 0);
}

#[test]
fn a_fast_open_connect_that_is_never_written_is_no_failure() {
    let mut bench = Bench::new(config());
    let end = |bench: &mut Bench, id, shut_down| {
        bench.apply(Event::Close {
            socket: socket(id, 0),
            at_ns: bench.now,
            tuple: tuple(40000, US),
            old: SYN_SENT,
            error: 0,
            segments_out: Some(0),
            shut_down,
            traffic: None,
        });
    };
    // However soon it is closed, and whether or not its connect() was seen.
    bench.connect(1, tuple(40000, US));
    end(&mut bench, 1, true);
    end(&mut bench, 2, true);
    assert!(bench.fold.snapshot().countries.is_empty());
    // However late connect() fails without a port or an address.
    bench.connect(3, tuple(40000, US));
    bench.now += MS;
    end(&mut bench, 3, false);
    let failures = bench.country("US").failures;
    assert_eq!(failures[FailureReason::Local as usize], 1);
    assert_eq!(failures.iter().sum::<u64>(), 1);
}

#[test]
fn failures_use_a_row_that_exists_and_end_unknown_or_simultaneous_handshakes_too() {
    let mut bench = Bench::new(config());
    bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
    // Under way at attach: no connect was seen.
    bench.close_with(2, 0, tuple(40001, US), SYN_SENT, 111, Some(1), None);
    // Simultaneous open, then a reset in SYN_RECV.
    bench.connect(3, tuple(40002, US));
    bench.close_with(3, 0, tuple(40002, US), SYN_RECV, 104, Some(2), None);
    let failures = bench
        .port(443, Direction::Outbound)
        .unwrap()
        .failures
        .unwrap();
    assert_eq!(failures[FailureReason::Refused as usize], 1);
    assert_eq!(failures[FailureReason::Reset as usize], 1);
    // A passive child that never completed is no failure.
    bench.close_with(4, 0, tuple(22, US), SYN_RECV, 104, Some(1), None);
    // Nor is an opened one that ends with an error.
    bench.close_with(1, 0, tuple(40000, US), ESTABLISHED, 104, Some(1), None);
    assert_eq!(bench.country("US").failures.iter().sum::<u64>(), 2);
    assert_eq!(bench.country("US").flows[1].closed, 1);
}

#[test]
fn a_birth_on_a_live_address_closes_the_old_connection() {
    let mut bench = Bench::new(config());
    bench.open(1, tuple(22, US), SYN_RECV, ESTABLISHED);
    bench.open(1, tuple(22, "203.0.113.1:5"), SYN_RECV, ESTABLISHED);
    assert_eq!(bench.country("US").flows[0].closed, 1);
    assert_eq!(bench.country("US").flows[0].connections, 0);
    bench.connect(1, tuple(4, US));
    assert_eq!(bench.country("DE").flows[0].closed, 1);
    // A connect on a pending one is just the newer connect.
    bench.connect(1, tuple(5, US));
    bench.open(1, tuple(5, US), SYN_SENT, ESTABLISHED);
    assert_eq!(bench.fold.snapshot().tracked, 1);
    let durations: u64 = bench.fold.snapshot().duration[0].counts.iter().sum();
    assert_eq!(durations, 0, "when they ended nobody saw");
}

#[test]
fn closes_of_unknown_and_closed_sockets_change_nothing() {
    let mut bench = Bench::new(config());
    bench.close(1, tuple(22, US), ESTABLISHED);
    assert!(bench.fold.snapshot().countries.is_empty());
    bench.open(1, tuple(22, US), SYN_RECV, ESTABLISHED);
    bench.close(1, tuple(22, US), ESTABLISHED);
    bench.close(1, tuple(22, US), ESTABLISHED);
    assert_eq!(bench.country("US").flows[0].closed, 1);
    assert_eq!(bench.fold.snapshot().folded, 4);
}

#[test]
fn an_event_of_another_connection_on_a_live_address_closes_the_old_one() {
    let mut bench = Bench::new(config());
    bench.open(1, tuple(22, US), SYN_RECV, ESTABLISHED);
    bench.close(1, tuple(23, "203.0.113.1:5"), ESTABLISHED);
    assert_eq!(bench.country("US").flows[0].closed, 1);
    assert_eq!(bench.fold.snapshot().tracked, 0);
}

#[test]
fn a_change_whose_open_was_lost_is_taken_in_and_can_close() {
    let mut bench = Bench::new(config());
    bench.change(1, tuple(22, US), CLOSE_WAIT);
    let snapshot = bench.fold.snapshot();
    assert_eq!(
        (snapshot.corrections.seeded, snapshot.tracked),
        (1, 1),
        "before the first merge"
    );
    bench.close(1, tuple(22, US), LAST_ACK);
    let row = bench.country("US");
    assert_eq!(row.flows[Direction::Unknown as usize].closed, 1);
    // A pending one was active, that much is known.
    bench.connect(2, tuple(40000, US));
    bench.change(2, tuple(40000, US), FIN_WAIT1);
    bench.close(2, tuple(40000, US), FIN_WAIT2);
    assert_eq!(bench.country("US").flows[1].closed, 1);
    assert_eq!(bench.country("US").flows[1].opened, 0);
}

#[test]
fn filtered_connections_leave_no_trace() {
    let mut bench = Bench::new(FoldConfig {
        filter: RemoteFilter {
            exclude_loopback: true,
            exclude: vec![Network {
                address: "203.0.113.0".parse().unwrap(),
                prefix: 24,
            }],
        },
        ..config()
    });
    for (id, remote) in [
        (1, "127.0.0.1:80"),
        (2, "10.0.0.1:80"),
        (3, "203.0.113.4:80"),
    ] {
        let tuple = tuple(40000, remote);
        bench.connect(id, tuple);
        bench.open(id, tuple, SYN_SENT, ESTABLISHED);
        bench.change(id, tuple, CLOSE_WAIT);
        bench.close(id, tuple, LAST_ACK);
        bench.close_with(id, 0, tuple, SYN_SENT, 111, Some(1), None);
    }
    assert!(bench.fold.snapshot().countries.is_empty());
    assert_eq!(bench.fold.snapshot().folded, 15);
}

#[test]
fn equal_endpoints_are_loopback_where_it_is_included() {
    let mut bench = Bench::new(FoldConfig {
        filter: RemoteFilter::default(),
        ..config()
    });
    bench.open(1, tuple(40000, "10.0.0.1:80"), SYN_SENT, ESTABLISHED);
    assert_eq!(bench.country("loopback").flows[1].connections, 1);
    assert_eq!(bench.atlas.lookups, 0);
}

#[test]
fn opens_at_the_cap_are_counted_but_in_no_gauge() {
    let mut bench = Bench::new(FoldConfig {
        connections_max: 2,
        ..config()
    });
    bench.connect(1, tuple(1, US));
    bench.open(2, tuple(2, US), SYN_SENT, ESTABLISHED);
    // Full, the pending one included.
    bench.connect(3, tuple(3, US));
    bench.open(3, tuple(3, US), SYN_SENT, ESTABLISHED);
    let snapshot = bench.fold.snapshot();
    assert_eq!(
        (
            snapshot.tracked,
            snapshot.untracked,
            snapshot.table_overflow
        ),
        (1, 1, 1)
    );
    let flow = bench.country("US").flows[1];
    assert_eq!((flow.opened, flow.connections), (2, 1));
    // Its own change is not taken for a new connection, its close is its end.
    bench.change(3, tuple(3, US), CLOSE_WAIT);
    assert_eq!(bench.fold.snapshot().untracked, 1);
    bench.close(3, tuple(3, US), LAST_ACK);
    assert_eq!(bench.fold.snapshot().untracked, 0);
    bench.close(3, tuple(3, US), LAST_ACK);
    assert_eq!(bench.fold.snapshot().untracked, 0);
    assert_eq!(bench.country("US").flows[1].closed, 0);
}

#[test]
fn cross_rows_agree_with_their_countries() {
    let mut bench = Bench::new(config());
    bench.open(1, tuple(22, US), SYN_RECV, ESTABLISHED);
    bench.open(2, tuple(22, "203.0.113.1:5"), SYN_RECV, ESTABLISHED);
    bench.open(3, tuple(40000, US), SYN_SENT, ESTABLISHED);
    bench.change(3, tuple(40000, US), CLOSE_WAIT);
    let snapshot = bench.fold.snapshot();
    assert!(snapshot.cross_enabled);
    let mut rows: Vec<_> = snapshot
        .cross
        .iter()
        .map(|row| {
            (
                row.country.code(),
                row.port,
                row.direction,
                row.connections,
                row.opened,
            )
        })
        .collect();
    rows.sort();
    assert_eq!(
        rows,
        [
            ("DE", PortLabel::Port(22), Direction::Inbound, 1, 1),
            ("US", PortLabel::Port(22), Direction::Inbound, 1, 1),
            ("US", PortLabel::Port(443), Direction::Outbound, 0, 1),
        ]
    );
}

#[test]
fn a_listening_port_has_a_row_before_anybody_connects() {
    let mut bench = Bench::new(config());
    for (id, address, port) in [(1, "0.0.0.0", 8080), (2, "127.0.0.1", 5432)] {
        bench.apply(Event::Listen {
            socket: socket(id, 0),
            address: address.parse().unwrap(),
            port,
            owner: Owner::default(),
        });
    }
    assert!(bench.port(8080, Direction::Inbound).is_some());
    assert!(
        bench.port(5432, Direction::Inbound).is_none(),
        "only ever hidden connections"
    );
    assert_eq!(bench.fold.snapshot().listeners.len(), 2);
    bench.apply(Event::Unlisten {
        socket: socket(1, 0),
        address: "0.0.0.0".parse().unwrap(),
        port: 8080,
    });
    assert_eq!(bench.fold.snapshot().listeners.len(), 1);
    assert!(
        bench.port(8080, Direction::Inbound).is_some(),
        "the row outlives the listener"
    );
}

#[test]
fn the_empty_fold_has_its_fixed_rows() {
    let snapshot = Fold::new(config()).snapshot();
    assert_eq!(snapshot.ports.len(), 3);
    assert!(
        snapshot
            .ports
            .iter()
            .all(|row| row.port == PortLabel::Other)
    );
    let families: Vec<_> = snapshot
        .series_overflow
        .iter()
        .map(|(name, _)| *name)
        .collect();
    assert_eq!(families, ["country_port", "listener", "port"]);
    assert_eq!(snapshot.drift, None);
}

#[test]
fn an_accept_of_a_hidden_socket_is_no_early_accept_of_the_next_one() {
    let mut bench = Bench::new(config());
    let hidden = Tuple {
        local: "127.0.0.1".parse().unwrap(),
        ..tuple(22, "127.0.0.1:50000")
    };
    let shown = tuple(22, "203.0.113.9:50000");
    bench.open(5, hidden, SYN_RECV, ESTABLISHED);
    bench.accept(5);
    bench.close(5, hidden, ESTABLISHED);
    bench.open(5, shown, SYN_RECV, ESTABLISHED);
    bench.now += 3 * MS;
    bench.accept(5);
    let three = Some(Sum {
        count: 1,
        sum_ns: 3 * MS,
    });
    let port = bench.port(22, Direction::Inbound).unwrap();
    assert_eq!(port.accept_wait, three);
    // The same where the close was lost and the address became a client's.
    bench.accept(6);
    bench.connect(6, tuple(40000, US));
    bench.close(6, tuple(40000, US), SYN_SENT);
    bench.open(6, shown, SYN_RECV, ESTABLISHED);
    let port = bench.port(22, Direction::Inbound).unwrap();
    assert_eq!(port.accept_wait, three);
}

#[test]
fn a_child_that_never_completes_is_no_failed_connect() {
    let mut bench = Bench::new(config());
    bench.connect(5, tuple(40000, US));
    // The close of 5 was lost; its address is a passive child's now.
    bench.close(5, tuple(22, "203.0.113.9:50000"), SYN_RECV);
    let failures: u64 = bench
        .fold
        .snapshot()
        .countries
        .iter()
        .flat_map(|row| row.failures)
        .sum();
    assert_eq!(failures, 0);
    // Its own simultaneous open that fails is one.
    bench.connect(5, tuple(40000, US));
    bench.close(5, tuple(40000, US), SYN_RECV);
    assert_eq!(bench.country("US").failures.iter().sum::<u64>(), 1);
}

#[test]
fn connects_that_nobody_answers_take_an_eighth_of_the_places_at_most() {
    let mut bench = Bench::new(FoldConfig {
        connections_max: 80,
        ..config()
    });
    // A scan by non-blocking connects, all of them under way.
    for id in 1..=200 {
        bench.connect(id, tuple(0, US));
    }
    assert_eq!(bench.fold.pending_overflow(), 190);
    for id in 1001..=1070 {
        bench.open(id, tuple(id as u16, US), SYN_RECV, ESTABLISHED);
    }
    let snapshot = bench.fold.snapshot();
    assert_eq!(
        (
            snapshot.tracked,
            snapshot.untracked,
            snapshot.table_overflow
        ),
        (70, 0, 0)
    );
    // One that was kept completes, one that was not completes in the place of
    // one that failed; only the first was timed.
    bench.open(1, tuple(2001, US), SYN_SENT, ESTABLISHED);
    bench.close(2, tuple(2002, US), SYN_SENT);
    bench.open(150, tuple(2150, US), SYN_SENT, ESTABLISHED);
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.tracked, snapshot.table_overflow), (72, 0));
    assert_eq!(snapshot.connect_latency.counts.iter().sum::<u64>(), 1);
    // All others fail and are counted so, kept or not; and the places of the
    // kept are free.
    for id in 3..=200 {
        if id != 150 {
            bench.close(id, tuple(2000, US), SYN_SENT);
        }
    }
    let failed: u64 = bench.country("US").failures.iter().sum();
    assert_eq!(failed, 198);
    for id in 301..=308 {
        bench.connect(id, tuple(0, US));
    }
    assert_eq!(bench.fold.pending_overflow(), 190);
}

/// `TCP_REPAIR`: both ends of a connection that was opened elsewhere, each by a
/// connect().
#[test]
fn a_restored_connection_is_a_seed_whose_direction_an_audit_finds() {
    let mut bench = Bench::new(config());
    bench.startup(vec![listen_row(80)]);
    let ends = [
        (1, tuple(80, "198.51.100.7:50001")),
        (2, tuple(81, "198.51.100.7:50002")),
    ];
    for (id, tuple) in ends {
        bench.connect(id, tuple);
        bench.apply(Event::Restore {
            socket: socket(id, 0),
            tuple,
        });
    }
    let opened = |bench: &Bench| bench.country("US").flows.map(|flow| flow.opened);
    assert_eq!(opened(&bench), [0; 3]);
    assert_eq!(bench.country("US").flows[2].connections, 2);
    assert_eq!(bench.fold.snapshot().corrections.seeded, 2);
    // A sample knows the listeners too, but looks for no directions.
    for audit in [false, true] {
        bench.walk(WalkMessage::Begin(Walk {
            trigger: Trigger::Interval,
            traffic: true,
            audit,
        }));
        let mut rows = vec![listen_row(80)];
        rows.extend(ends.map(|(_, tuple)| row(ESTABLISHED, tuple, 0)));
        bench.namespace(1, rows);
        bench.end();
        let inbound = bench.port(80, Direction::Inbound).unwrap().flow.connections;
        assert_eq!(inbound, u64::from(audit));
    }
    assert!(bench.port(50001, Direction::Outbound).is_none());
    bench.close_with(1, 0, ends[0].1, ESTABLISHED, 0, Some(1), None);
    bench.close_with(2, 0, ends[1].1, ESTABLISHED, 0, Some(1), None);
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.tracked, snapshot.established), (0, 0));
    assert_eq!(opened(&bench), [0; 3]);
    let durations = snapshot.duration.iter().flat_map(|one| &one.counts);
    assert_eq!(
        durations.sum::<u64>(),
        0,
        "nobody knows since when it was open"
    );
}
