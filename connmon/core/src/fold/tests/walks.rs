//! The merge of rows with events.

use super::*;

const US: &str = "198.51.100.7:443";
const DE: &str = "203.0.113.9:50000";

#[test]
fn seeds_take_their_direction_from_listeners_and_the_ephemeral_range() {
    let mut bench = Bench::new(config());
    bench.startup(vec![
        listen_row(22),
        row(ESTABLISHED, tuple(22, DE), 1),
        row(ESTABLISHED, tuple(40000, US), 2),
        row(ESTABLISHED, tuple(179, US), 3),
        row(CLOSE_WAIT, tuple(40001, "[2001:db8::1]:80"), 4),
        row(SYN_SENT, tuple(40002, US), 5),
        row(SYN_RECV, tuple(22, US), 6),
    ]);
    let snapshot = bench.fold.snapshot();
    assert_eq!(snapshot.corrections.seeded, 4);
    assert_eq!(snapshot.drift, Some(0), "seeds are no drift");
    assert_eq!((snapshot.tracked, snapshot.established), (4, 3));
    assert_eq!(snapshot.audited_states, [1, 1, 0, 0, 1, 0, 0]);
    assert_eq!(bench.country("DE").flows[0].connections, 1);
    assert_eq!(
        bench.port(22, Direction::Inbound).unwrap().flow.connections,
        1
    );
    assert_eq!(
        bench
            .port(443, Direction::Outbound)
            .unwrap()
            .flow
            .connections,
        1
    );
    assert_eq!(bench.other(Direction::Unknown).flow.connections, 1);
    assert_eq!(bench.port(80, Direction::Outbound).unwrap().close_wait, 1);
    let opened: u64 = snapshot.ports.iter().map(|row| row.flow.opened).sum();
    assert_eq!(opened, 0);
}

#[test]
fn listen_rows_may_come_last() {
    let mut bench = Bench::new(config());
    bench.startup(vec![
        row(ESTABLISHED, tuple(40000, DE), 1),
        listen_row(40000),
    ]);
    assert_eq!(
        bench
            .port(40000, Direction::Inbound)
            .unwrap()
            .flow
            .connections,
        1
    );
    assert_eq!(bench.other(Direction::Unknown).flow, Flow::default());
    assert_eq!(bench.country("DE").flows[2], Flow::default());
}

#[test]
fn the_startup_seeds_the_union_of_both_passes() {
    let mut bench = Bench::new(config());
    let [a, b, c] = [1, 2, 3].map(|n| row(ESTABLISHED, tuple(40000 + n, US), n.into()));
    bench.begin(Trigger::Startup);
    bench.namespace_begin(1);
    // Read at the same time, so their rows are mixed.
    bench.rows(0, vec![a, b, b]);
    bench.rows(1, vec![c]);
    bench.rows(0, vec![a]);
    bench.rows(1, vec![b, c]);
    bench.namespace_end(1, true);
    bench.end();
    assert_eq!(bench.fold.snapshot().corrections.seeded, 3);
    assert_eq!(bench.fold.snapshot().established, 3);
}

/// Its close has the port that it had, and would find no such seed.
#[test]
fn a_socket_that_has_given_its_port_back_is_no_seed() {
    let mut bench = Bench::new(config());
    bench.startup(vec![
        row(ESTABLISHED, tuple(0, DE), 1),
        row(ESTABLISHED, tuple(22, DE), 2),
    ]);
    assert_eq!(bench.fold.snapshot().corrections.seeded, 1);
    bench.audit(vec![row(LAST_ACK, tuple(0, US), 3)]);
    assert_eq!(bench.fold.snapshot().corrections.added, 0);
}

#[test]
fn later_events_find_seeds_by_cookie_or_endpoints() {
    let mut bench = Bench::new(config());
    bench.startup(vec![
        listen_row(22),
        row(ESTABLISHED, tuple(22, DE), 1),
        row(ESTABLISHED, tuple(40000, US), 2),
        row(ESTABLISHED, tuple(40001, US), 3),
    ]);
    bench.change(11, tuple(22, DE), CLOSE_WAIT);
    assert_eq!(bench.country("DE").flows[0].connections, 0);
    bench.close(11, tuple(22, DE), LAST_ACK);
    assert_eq!(bench.country("DE").flows[0].closed, 1);
    bench.close_with(12, 2, tuple(40000, US), ESTABLISHED, 0, None, None);
    assert_eq!(bench.country("US").flows[1].closed, 1);
    // Another cookie is another socket.
    bench.close_with(13, 99, tuple(40001, US), ESTABLISHED, 0, None, None);
    assert_eq!(bench.country("US").flows[1].closed, 1);
    let durations: u64 = (0..3)
        .map(|d| bench.fold.snapshot().duration[d].counts.iter().sum::<u64>())
        .sum();
    assert_eq!(durations, 0, "seeds are not observed");
}

#[test]
fn a_row_read_before_its_close_adds_nothing() {
    for cookies in [(7, 7), (0, 7), (7, 0), (0, 0)] {
        let mut bench = Bench::new(config());
        bench.begin(Trigger::Startup);
        bench.namespace_begin(1);
        bench.close_with(1, cookies.0, tuple(22, DE), ESTABLISHED, 0, None, None);
        bench.rows(0, vec![row(ESTABLISHED, tuple(22, DE), cookies.1)]);
        bench.namespace_end(1, true);
        bench.end();
        assert_eq!(bench.fold.snapshot().tracked, 0, "{cookies:?}");
    }
}

#[test]
fn a_connection_during_a_walk_is_counted_once() {
    let mut bench = Bench::new(config());
    bench.begin(Trigger::Startup);
    bench.namespace_begin(1);
    bench.open(1, tuple(22, DE), SYN_RECV, ESTABLISHED);
    bench.rows(0, vec![row(ESTABLISHED, tuple(22, DE), 5)]);
    bench.close_with(1, 5, tuple(22, DE), ESTABLISHED, 0, None, None);
    bench.rows(1, vec![row(ESTABLISHED, tuple(22, DE), 5)]);
    bench.namespace_end(1, true);
    bench.end();
    let flow = bench.country("DE").flows[0];
    assert_eq!((flow.opened, flow.closed, flow.connections), (1, 1, 0));
    assert_eq!(bench.fold.snapshot().corrections, Corrections::default());
}

#[test]
fn a_socket_connected_again_within_a_walk_keeps_its_cookie_and_its_entry() {
    let mut bench = Bench::new(config());
    bench.begin(Trigger::Startup);
    bench.namespace_begin(1);
    let socket = Socket {
        id: 1,
        cookie: 5,
        netns: 1,
    };
    for _ in 0..2 {
        let at_ns = bench.now;
        bench.apply(Event::Open {
            socket,
            at_ns,
            tuple: tuple(40000, US),
            old: SYN_SENT,
            new: ESTABLISHED,
        });
        bench.now += MS;
        if bench.country("US").flows[1].opened == 1 {
            bench.close_with(1, 5, tuple(40000, US), ESTABLISHED, 0, None, None);
        }
    }
    // The row, with the bytes of the first connection, is not of the second.
    let mut first_life = row(ESTABLISHED, tuple(40000, US), 5);
    first_life.traffic = Some(stats(1000, 1000, 0, 0));
    bench.rows(0, vec![first_life]);
    bench.namespace_end(1, true);
    bench.end();
    let flow = bench.country("US").flows[1];
    assert_eq!((flow.opened, flow.closed, flow.connections), (2, 1, 1));
    assert_eq!((flow.received_bytes, flow.sent_bytes), (0, 0));
}

/// Its close may be lost, or still to come, or it lives on another device:
/// audits know.
#[test]
fn a_birth_on_a_seeds_endpoints_leaves_the_seed_to_audits() {
    let mut bench = Bench::new(config());
    bench.startup(vec![row(ESTABLISHED, tuple(40000, US), 2)]);
    bench.connect(9, tuple(40000, US));
    bench.open(9, tuple(40000, US), SYN_SENT, ESTABLISHED);
    let flow = bench.country("US").flows[1];
    assert_eq!((flow.opened, flow.closed, flow.connections), (1, 0, 2));
    for _ in 0..2 {
        bench.audit(vec![row(ESTABLISHED, tuple(40000, US), 3)]);
    }
    let flow = bench.country("US").flows[1];
    assert_eq!((flow.opened, flow.closed, flow.connections), (1, 0, 1));
    assert_eq!(bench.fold.snapshot().corrections.removed, 1);
}

/// Sockets of one namespace with the same endpoints, as bound devices and VRFs
/// allow, numbered from 1.
const EQUAL: u64 = 4;

/// The row of one of several sockets with equal endpoints, which has sent ten times its number.
fn equal(number: u64) -> Row {
    let mut row = row(ESTABLISHED, tuple(40000, US), 100 + number);
    row.traffic = Some(stats(0, 10 * number, 0, 0));
    row
}

/// The close of one of them, whose cookie is known by now.
fn close_equal(bench: &mut Bench, number: u64) {
    let sent = stats(0, 10 * number + 1, 0, 0);
    let (cookie, ends) = (100 + number, tuple(40000, US));
    bench.close_with(number, cookie, ends, ESTABLISHED, 0, None, Some(sent));
}

#[test]
fn equal_endpoints_keep_their_own_closes_and_bytes() {
    // In whatever order rows and closes come.
    for first in 1..=EQUAL {
        let mut bench = Bench::new(config());
        bench.startup(vec![]);
        for number in 1..=EQUAL {
            bench.open(number, tuple(40000, US), SYN_SENT, ESTABLISHED);
        }
        let order: Vec<u64> = (0..EQUAL).map(|n| (n + first) % EQUAL + 1).collect();
        let mut rows: Vec<Row> = order.iter().map(|&number| equal(number)).collect();
        // A row may come twice.
        rows.push(rows[0]);
        for _ in 0..3 {
            bench.audit(rows.clone());
            let snapshot = bench.fold.snapshot();
            assert_eq!(snapshot.established, EQUAL);
            assert_eq!(snapshot.drift, Some(0));
            assert_eq!(snapshot.drift_suspected, Some(0));
        }
        for (closed, number) in (1..).zip(1..=EQUAL) {
            close_equal(&mut bench, number);
            let flow = bench.country("US").flows[1];
            assert_eq!((flow.closed, flow.connections), (closed, EQUAL - closed));
            rows.retain(|row| row.cookie != 100 + number);
            bench.audit(rows.clone());
            let snapshot = bench.fold.snapshot();
            assert_eq!(snapshot.drift, Some(0), "{order:?} {number}");
            assert_eq!(snapshot.drift_suspected, Some(0), "{order:?} {number}");
        }
        let flow = bench.country("US").flows[1];
        assert_eq!((flow.opened, flow.closed), (EQUAL, EQUAL));
        let sent: u64 = (1..=EQUAL).map(|number| 10 * number).sum();
        assert_eq!(flow.sent_bytes, sent, "{order:?}");
        let durations: u64 = bench.fold.snapshot().duration[1].counts.iter().sum();
        assert_eq!(durations, EQUAL);
        assert_eq!(bench.fold.snapshot().corrections, Corrections::default());
    }
}

#[test]
fn a_close_between_rows_ends_its_own_entry() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    for number in 1..=3 {
        bench.open(number, tuple(40000, US), SYN_SENT, ESTABLISHED);
    }
    // The first row goes to the entry that opened last, which is another's.
    bench.begin(Trigger::Interval);
    bench.namespace_begin(1);
    bench.rows(0, vec![equal(1)]);
    close_equal(&mut bench, 1);
    bench.rows(0, vec![equal(2), equal(3)]);
    bench.namespace_end(1, true);
    bench.end();
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.established, snapshot.tracked), (2, 2));
    assert_eq!(
        (snapshot.drift, snapshot.drift_suspected),
        (Some(0), Some(0))
    );
    for number in [3, 2] {
        close_equal(&mut bench, number);
    }
    let flow = bench.country("US").flows[1];
    assert_eq!((flow.opened, flow.closed, flow.connections), (3, 3, 0));
}

#[test]
fn each_socket_with_equal_endpoints_is_a_seed() {
    // By cookie (dumps), by inode (/proc), by kernel address (a source).
    let by_cookie = |number: u64| equal(number);
    let by_inode = |number: u64| Row {
        inode: number as u32,
        cookie: 0,
        traffic: None,
        ..equal(number)
    };
    let by_address = |number: u64| Row {
        id: number,
        cookie: 0,
        ..equal(number)
    };
    let shown: [&dyn Fn(u64) -> Row; 3] = [&by_cookie, &by_inode, &by_address];
    for (way, shown) in shown.iter().enumerate() {
        let mut bench = Bench::new(config());
        let rows: Vec<Row> = (1..=EQUAL).map(shown).collect();
        bench.startup(rows.clone());
        let corrections = bench.fold.snapshot().corrections;
        assert_eq!(corrections.seeded, EQUAL, "{way}");
        // Audits go on by whatever the namespace is read by.
        let audited: Vec<Row> = match way {
            1 => rows,
            _ => (1..=EQUAL).rev().map(by_cookie).collect(),
        };
        for _ in 0..2 {
            bench.audit(audited.clone());
            let snapshot = bench.fold.snapshot();
            assert_eq!(snapshot.established, EQUAL, "{way}");
            assert_eq!(snapshot.drift, Some(0), "{way}");
            assert_eq!(snapshot.drift_suspected, Some(0), "{way}");
        }
        for number in 1..=EQUAL {
            match way {
                1 => bench.close(number, tuple(40000, US), ESTABLISHED),
                _ => close_equal(&mut bench, number),
            }
            let flow = bench.country("US").flows[1];
            assert_eq!((flow.closed, flow.connections), (number, EQUAL - number));
        }
        // Bytes of before are not counted, those of since are.
        let sent = if way == 1 { 0 } else { EQUAL };
        assert_eq!(bench.country("US").flows[1].sent_bytes, sent, "{way}");
    }
}

#[test]
fn an_event_names_one_of_several_equal_endpoints() {
    let mut bench = Bench::new(config());
    bench.change(1, tuple(40000, US), CLOSE_WAIT);
    let mut rows: Vec<Row> = [2, 1, 3].map(equal).to_vec();
    rows[1].state = CLOSE_WAIT;
    bench.startup(rows);
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.tracked, snapshot.established), (3, 2));
    for number in 1..=3 {
        close_equal(&mut bench, number);
        assert_eq!(bench.fold.snapshot().tracked, 3 - number);
    }
    let flow = bench.country("US").flows[1];
    assert_eq!((flow.closed, flow.sent_bytes), (3, 3));
}

#[test]
fn a_removal_without_a_known_loss_is_reported_once() {
    let mut bench = Bench::new(config());
    bench.startup(vec![row(CLOSE_WAIT, tuple(22, DE), 0)]);
    bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
    bench.open(2, tuple(40000, US), SYN_SENT, ESTABLISHED);
    bench.open(3, tuple(40001, US), SYN_SENT, ESTABLISHED);
    bench.change(3, tuple(40001, US), FIN_WAIT1);
    bench.now += 1_000 * MS;
    // The closes of 1 and 3 and of the seed are lost.
    bench.audit(vec![equal(2)]);
    assert_eq!(
        bench.fold.take_unexplained(),
        None,
        "they may be on their way"
    );
    bench.now += 60_000 * MS;
    bench.audit(vec![equal(2)]);
    let found = bench.fold.take_unexplained().unwrap();
    let by_state = [
        ((ESTABLISHED, Direction::Outbound), 1),
        ((FIN_WAIT1, Direction::Outbound), 1),
        ((CLOSE_WAIT, Direction::Unknown), 1),
    ];
    assert_eq!(found.by_state, by_state.into());
    let text = found.to_string();
    assert!(
        text.starts_with(
            "3 connections (1 outbound established, 1 outbound fin_wait1, 1 unknown close_wait; \
             last seen at most 61.0 to 61.0 s ago"
        ),
        "{text}"
    );
    assert_eq!(bench.fold.take_unexplained(), None);
    // Nothing more goes, and nothing more is reported.
    bench.audit(vec![equal(2)]);
    assert_eq!(bench.fold.take_unexplained(), None);
}

#[test]
fn a_known_loss_explains_what_goes_within_two_audits() {
    // Reported before, between and during the two that do not show it,
    // and after they are over.
    for reported in 0..4 {
        let mut bench = Bench::new(config());
        bench.startup(vec![]);
        let report = |bench: &mut Bench, when| {
            if when == reported {
                bench.fold.lost(1);
            }
        };
        bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
        report(&mut bench, 0);
        bench.audit(vec![]);
        report(&mut bench, 1);
        bench.begin(Trigger::Interval);
        report(&mut bench, 2);
        bench.namespace(1, vec![]);
        bench.end();
        report(&mut bench, 3);
        assert_eq!(bench.fold.snapshot().corrections.removed, 1);
        assert_eq!(bench.fold.take_unexplained(), None, "{reported}");
        // Two whole audits later it explains nothing any more.
        bench.audit(vec![]);
        bench.audit(vec![]);
        bench.open(2, tuple(40000, US), SYN_SENT, ESTABLISHED);
        bench.audit(vec![]);
        bench.audit(vec![]);
        assert!(bench.fold.take_unexplained().is_some(), "{reported}");
    }
}

#[test]
fn of_equal_endpoints_only_the_absent_is_removed() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    for number in 1..=3 {
        bench.open(number, tuple(40000, US), SYN_SENT, ESTABLISHED);
    }
    // The close of 2 is lost.
    let rows = vec![equal(3), equal(1)];
    bench.audit(rows.clone());
    assert_eq!(bench.fold.snapshot().drift_suspected, Some(1));
    bench.audit(rows.clone());
    let snapshot = bench.fold.snapshot();
    assert_eq!(
        (snapshot.drift, snapshot.drift_suspected),
        (Some(1), Some(0))
    );
    assert_eq!((snapshot.established, snapshot.corrections.removed), (2, 1));
    bench.audit(rows);
    assert_eq!(bench.fold.snapshot().drift, Some(0));
}

#[test]
fn a_change_before_its_seed_gets_its_direction_from_the_row() {
    let mut bench = Bench::new(config());
    bench.change(1, tuple(22, DE), CLOSE_WAIT);
    bench.startup(vec![listen_row(22), row(CLOSE_WAIT, tuple(22, DE), 5)]);
    assert_eq!(bench.fold.snapshot().corrections.seeded, 1);
    bench.close(1, tuple(22, DE), LAST_ACK);
    assert_eq!(bench.port(22, Direction::Inbound).unwrap().flow.closed, 1);
}

#[test]
fn one_row_adds_and_that_is_drift() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    bench.audit(vec![listen_row(22), row(ESTABLISHED, tuple(22, DE), 1)]);
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.corrections.added, snapshot.drift), (1, Some(1)));
    assert_eq!(bench.country("DE").flows[0].connections, 1);
    assert_eq!(bench.country("DE").flows[0].opened, 0);
    bench.audit(vec![listen_row(22), row(ESTABLISHED, tuple(22, DE), 1)]);
    assert_eq!(bench.fold.snapshot().drift, Some(0));
}

#[test]
fn absence_from_two_complete_audits_removes() {
    let mut bench = Bench::new(config());
    let present = row(ESTABLISHED, tuple(22, DE), 1);
    bench.startup(vec![present]);
    bench.audit(vec![]);
    assert_eq!(bench.fold.snapshot().established, 1);
    bench.audit(vec![present]);
    bench.audit(vec![]);
    assert_eq!(bench.fold.snapshot().established, 1, "the row cleared it");
    bench.begin(Trigger::Interval);
    bench.namespace_begin(1);
    bench.namespace_end(1, false);
    bench.end();
    assert_eq!(
        bench.fold.snapshot().established,
        1,
        "an incomplete audit proves nothing"
    );
    bench.audit(vec![]);
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.established, snapshot.tracked), (0, 0));
    assert_eq!((snapshot.corrections.removed, snapshot.drift), (1, Some(1)));
    let closed: u64 = snapshot.ports.iter().map(|row| row.flow.closed).sum();
    assert_eq!(closed, 0);
}

#[test]
fn an_event_since_the_walk_began_beats_absence() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    bench.open(1, tuple(22, DE), SYN_RECV, ESTABLISHED);
    bench.audit(vec![]);
    bench.begin(Trigger::Interval);
    bench.namespace(1, vec![]);
    bench.change(1, tuple(22, DE), CLOSE_WAIT);
    bench.end();
    bench.audit(vec![]);
    assert_eq!(bench.fold.snapshot().tracked, 1);
    bench.audit(vec![]);
    assert_eq!(bench.fold.snapshot().tracked, 0);
}

#[test]
fn a_rows_state_wins_where_no_event_is_newer() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    bench.open(1, tuple(22, DE), SYN_RECV, ESTABLISHED);
    bench.audit(vec![row(CLOSE_WAIT, tuple(22, DE), 1)]);
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.established, snapshot.tracked), (0, 1));
    assert_eq!((snapshot.corrections.updated, snapshot.drift), (1, Some(1)));
    // States without an event are updated and not counted.
    bench.audit(vec![row(LAST_ACK, tuple(22, DE), 1)]);
    assert_eq!(bench.fold.snapshot().corrections.updated, 1);
    // An event after the row was read wins.
    bench.open(2, tuple(23, DE), SYN_RECV, ESTABLISHED);
    bench.begin(Trigger::Interval);
    bench.namespace_begin(1);
    bench.change(2, tuple(23, DE), CLOSE_WAIT);
    let rows = vec![
        row(LAST_ACK, tuple(22, DE), 1),
        row(ESTABLISHED, tuple(23, DE), 2),
    ];
    bench.rows(0, rows);
    bench.namespace_end(1, true);
    bench.end();
    assert_eq!(bench.fold.snapshot().established, 0);
    assert_eq!(bench.fold.snapshot().corrections.updated, 1);
}

#[test]
fn namespaces_out_of_reach_keep_their_entries_until_something_is_lost() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    let far = Socket {
        id: 1,
        cookie: 0,
        netns: 77,
    };
    let at_ns = bench.now;
    bench.apply(Event::Open {
        socket: far,
        at_ns,
        tuple: tuple(22, DE),
        old: SYN_RECV,
        new: ESTABLISHED,
    });
    for _ in 0..3 {
        bench.audit(vec![]);
    }
    assert_eq!(bench.fold.snapshot().established, 1);
    bench.fold.lost(12);
    assert_eq!(bench.fold.snapshot().unattributed, 12);
    bench.audit(vec![]);
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.established, snapshot.corrections.removed), (0, 1));
    assert_eq!(snapshot.drift, Some(1));
    // Events since the walk began survive.
    bench.fold.lost(1);
    bench.begin(Trigger::Loss);
    let at_ns = bench.now;
    bench.apply(Event::Open {
        socket: far,
        at_ns,
        tuple: tuple(22, DE),
        old: SYN_RECV,
        new: ESTABLISHED,
    });
    bench.namespace(1, vec![]);
    bench.end();
    assert_eq!(bench.fold.snapshot().established, 1);
}

#[test]
fn events_without_a_namespace_meet_rows_of_any() {
    let mut bench = Bench::new(config());
    let socket = Socket {
        id: 1,
        cookie: 0,
        netns: 0,
    };
    let at_ns = bench.now;
    bench.apply(Event::Open {
        socket,
        at_ns,
        tuple: tuple(22, DE),
        old: SYN_RECV,
        new: ESTABLISHED,
    });
    bench.begin(Trigger::Startup);
    bench.namespace(5, vec![row(ESTABLISHED, tuple(22, DE), 1)]);
    bench.namespace(6, vec![row(ESTABLISHED, tuple(22, DE), 2)]);
    bench.end();
    let snapshot = bench.fold.snapshot();
    assert_eq!(
        (snapshot.established, snapshot.corrections.seeded),
        (2, 1),
        "one to one"
    );
    let at_ns = bench.now;
    bench.apply(Event::Close {
        socket,
        at_ns,
        tuple: tuple(22, DE),
        old: ESTABLISHED,
        error: 0,
        segments_out: None,
        shut_down: false,
        traffic: None,
    });
    assert_eq!(bench.fold.snapshot().established, 1);
}

#[test]
fn rows_under_a_surrogate_id_match_events() {
    let mut bench = Bench::new(config());
    bench.open(1, tuple(22, DE), SYN_RECV, ESTABLISHED);
    bench.open(2, tuple(23, DE), SYN_RECV, ESTABLISHED);
    for _ in 0..3 {
        bench.begin(Trigger::Interval);
        bench.walk(WalkMessage::NamespaceBegin {
            netns: 4_000_000_000,
            surrogate: true,
            t0_ns: bench.now,
            ephemeral: (32768, 60999),
        });
        bench.rows(0, vec![row(ESTABLISHED, tuple(22, DE), 0)]);
        bench.namespace_end(4_000_000_000, true);
        bench.end();
    }
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.established, snapshot.corrections.added), (1, 0));
    assert_eq!(
        snapshot.corrections.removed, 1,
        "everything was read, 23 was not there"
    );
}

#[test]
fn rows_beyond_the_cap_are_untracked_and_no_drift() {
    let mut bench = Bench::new(FoldConfig {
        connections_max: 2,
        ..config()
    });
    let rows: Vec<Row> = (1..=5)
        .map(|n| row(ESTABLISHED, tuple(40000 + n, US), n.into()))
        .collect();
    bench.startup(rows.clone());
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.tracked, snapshot.untracked), (2, 3));
    bench.close_with(1, 1, tuple(40001, US), ESTABLISHED, 0, None, None);
    bench.audit(rows[1..].to_vec());
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.tracked, snapshot.untracked), (2, 2));
    assert_eq!((snapshot.corrections.added, snapshot.drift), (1, Some(0)));
    bench.audit(rows[1..3].to_vec());
    assert_eq!(bench.fold.snapshot().untracked, 0);
}

#[test]
fn hidden_connections_are_counted_once_each() {
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
    bench.startup(vec![
        row(ESTABLISHED, tuple(1, "127.0.0.1:9"), 1),
        row(ESTABLISHED, tuple(9, "127.0.0.1:1"), 2),
        row(CLOSE_WAIT, tuple(9, "127.0.0.1:2"), 3),
        row(ESTABLISHED, tuple(22, DE), 4),
    ]);
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.hidden_loopback, snapshot.hidden_excluded), (2, 1));
    assert_eq!((snapshot.tracked, snapshot.audited_states), (0, [0; 7]));
}

#[test]
fn a_traffic_walk_corrects_nothing() {
    let mut bench = Bench::new(config());
    bench.startup(vec![row(ESTABLISHED, tuple(22, DE), 1)]);
    for _ in 0..3 {
        bench.walk(WalkMessage::Begin(Walk {
            trigger: Trigger::Interval,
            traffic: true,
            audit: false,
        }));
        bench.namespace(1, vec![row(CLOSE_WAIT, tuple(23, DE), 2)]);
        bench.end();
    }
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.tracked, snapshot.established), (1, 1));
    assert_eq!(
        snapshot.corrections,
        Corrections {
            seeded: 1,
            ..Corrections::default()
        }
    );
}

#[test]
fn a_stale_entry_does_not_shadow_the_connection_that_took_its_endpoints() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    // The close of 1 is lost, 2 reuses the endpoints from another socket.
    bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
    bench.open(2, tuple(40000, US), SYN_SENT, ESTABLISHED);
    for _ in 0..2 {
        bench.audit(vec![row(ESTABLISHED, tuple(40000, US), 9)]);
    }
    assert_eq!(bench.fold.snapshot().established, 1);
    bench.close_with(2, 9, tuple(40000, US), ESTABLISHED, 0, None, None);
    assert_eq!(bench.fold.snapshot().established, 0);
    // Close of 3 and open of 4 lost: the row's cookie goes to 3, and 4's own
    // event finds it by that cookie.
    bench.open(3, tuple(40001, US), SYN_SENT, ESTABLISHED);
    bench.audit(vec![row(ESTABLISHED, tuple(40001, US), 10)]);
    bench.close_with(4, 10, tuple(40001, US), ESTABLISHED, 0, None, None);
    assert_eq!(bench.fold.snapshot().tracked, 0);
}

#[test]
fn walks_that_break_off_or_overlap_do_no_harm() {
    let mut bench = Bench::new(config());
    let present = row(ESTABLISHED, tuple(22, DE), 1);
    bench.startup(vec![present]);
    for _ in 0..3 {
        bench.begin(Trigger::Interval);
        bench.namespace(1, vec![]);
    }
    bench.end();
    assert_eq!(bench.fold.snapshot().tracked, 1, "only one audit ended");
    bench.rows(0, vec![row(ESTABLISHED, tuple(23, DE), 2)]);
    bench.end();
    assert_eq!(bench.fold.snapshot().tracked, 1, "rows without a walk");
}

#[test]
fn a_forgotten_pending_open_goes_after_ten_minutes() {
    let mut bench = Bench::new(FoldConfig {
        connections_max: 1,
        ..config()
    });
    bench.startup(vec![]);
    bench.connect(1, tuple(40000, US));
    bench.now += 599 * S;
    bench.audit(vec![]);
    bench.now += 2 * S;
    bench.audit(vec![]);
    bench.open(2, tuple(40001, US), SYN_SENT, ESTABLISHED);
    assert_eq!(bench.fold.snapshot().tracked, 1, "a place is free");
}

/// A namespace known by its table's inode, with rows from /proc.
fn surrogate(bench: &mut Bench, netns: NetnsId, rows: Vec<Row>) {
    bench.now += MS;
    bench.walk(WalkMessage::NamespaceBegin {
        netns,
        surrogate: true,
        t0_ns: bench.now,
        ephemeral: (32768, 60999),
    });
    bench.rows(0, rows);
    bench.namespace_end(netns, true);
}

#[test]
fn the_same_endpoints_under_two_surrogates_are_two_connections() {
    let mut bench = Bench::new(config());
    let equal = row(ESTABLISHED, tuple(22, DE), 0);
    for trigger in [Trigger::Startup, Trigger::Interval, Trigger::Interval] {
        bench.begin(trigger);
        // Twice: rows may be repeated.
        surrogate(&mut bench, 4_000_000_000, vec![equal, equal]);
        surrogate(&mut bench, 4_000_000_001, vec![equal, equal]);
        bench.end();
        let snapshot = bench.fold.snapshot();
        assert_eq!((snapshot.established, snapshot.corrections.seeded), (2, 2));
        assert_eq!((snapshot.corrections.added, snapshot.drift), (0, Some(0)));
    }
    // Each close takes one.
    for id in [1, 2] {
        bench.close(id, tuple(22, DE), ESTABLISHED);
        assert_eq!(bench.fold.snapshot().established, 2 - id);
    }
}

#[test]
fn a_reused_slot_keeps_its_direction() {
    let mut bench = Bench::new(config());
    bench.begin(Trigger::Startup);
    bench.namespace_begin(2);
    bench.rows(0, vec![row(ESTABLISHED, tuple(22, DE), 1)]);
    // It closes, and one of namespace 1 takes its slot.
    bench.apply(Event::Close {
        socket: Socket {
            id: 7,
            cookie: 1,
            netns: 2,
        },
        at_ns: bench.now,
        tuple: tuple(22, DE),
        old: ESTABLISHED,
        error: 0,
        segments_out: None,
        shut_down: false,
        traffic: None,
    });
    bench.change(8, tuple(40000, US), CLOSE_WAIT);
    let mut listen = listen_row(40000);
    listen.tuple.local = "10.0.0.1".parse().unwrap();
    bench.rows(0, vec![listen]);
    bench.namespace_end(2, true);
    bench.namespace(1, vec![row(CLOSE_WAIT, tuple(40000, US), 2)]);
    bench.end();
    bench.close_with(8, 2, tuple(40000, US), CLOSE_WAIT, 0, None, None);
    assert_eq!(bench.country("US").flows.map(|flow| flow.closed), [0, 1, 0]);
}

#[test]
fn a_flood_of_closes_adds_nothing_back() {
    use crate::fold::tombstones::MAX;
    let mut bench = Bench::new(config());
    bench.begin(Trigger::Startup);
    bench.namespace_begin(1);
    let flood = |bench: &mut Bench| {
        // One of them is loopback.
        for n in 0..MAX as u32 + 2 {
            let remote = Tuple {
                remote: IpAddr::from((0x0a00_0000 + n).to_be_bytes()),
                ..tuple(22, DE)
            };
            let event = Event::Close {
                socket: socket(u64::from(n) + 100, 0),
                at_ns: bench.now,
                tuple: remote,
                old: ESTABLISHED,
                error: 0,
                segments_out: None,
                shut_down: false,
                traffic: None,
            };
            bench.fold.apply(bench.now, &event, &mut bench.atlas);
        }
    };
    flood(&mut bench);
    bench.namespace_end(1, true);
    assert_eq!(bench.fold.snapshot().tombstone_overflow, 1);
    bench.now += 100 * MS;
    bench.namespace_begin(1);
    bench.close(1, tuple(23, DE), ESTABLISHED);
    bench.rows(0, vec![row(ESTABLISHED, tuple(23, DE), 0)]);
    bench.namespace_end(1, true);
    bench.end();
    assert_eq!(bench.fold.snapshot().tracked, 0, "it stays closed");
    assert!(bench.fold.suspects() > 0, "another audit is due");
    // An audit heals a namespace that it began later, in spite of a flood.
    bench.begin(Trigger::Interval);
    bench.namespace_begin(2);
    flood(&mut bench);
    bench.namespace_end(2, true);
    bench.now += 100 * MS;
    bench.namespace(1, vec![row(ESTABLISHED, tuple(24, DE), 0)]);
    bench.end();
    assert_eq!(bench.fold.snapshot().corrections.added, 1);
    bench.audit(vec![row(ESTABLISHED, tuple(24, DE), 0)]);
    assert_eq!(bench.fold.suspects(), 0);
}

#[test]
fn a_failed_listing_together_with_a_loss_evicts_nothing_yet() {
    let mut bench = Bench::new(config());
    bench.startup(vec![row(ESTABLISHED, tuple(22, DE), 1)]);
    bench.fold.lost(1);
    bench.begin(Trigger::Loss);
    bench.walk(WalkMessage::End(WalkSummary {
        unaudited: 1,
        unlisted: true,
        ..WalkSummary::default()
    }));
    while bench.fold.sweep(bench.now) {}
    assert_eq!(bench.fold.snapshot().established, 1);
    // The loss is not forgotten.
    bench.begin(Trigger::Interval);
    bench.namespace(2, vec![]);
    bench.end();
    assert_eq!(bench.fold.snapshot().established, 0);
}

#[test]
fn a_namespace_known_from_events_alone_is_counted() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    let elsewhere = |id| Socket {
        netns: 3,
        ..socket(id, 0)
    };
    for id in 1..=2 {
        let event = Event::Open {
            socket: elsewhere(id),
            at_ns: bench.now,
            tuple: tuple(40000 + id as u16, DE),
            old: SYN_RECV,
            new: ESTABLISHED,
        };
        bench.apply(event);
    }
    bench.audit(vec![]);
    assert_eq!(bench.fold.unlisted_namespaces(), 1);
    assert_eq!(bench.fold.snapshot().established, 2);
    for id in 1..=2 {
        let event = Event::Close {
            socket: elsewhere(id),
            at_ns: bench.now,
            tuple: tuple(40000 + id as u16, DE),
            old: ESTABLISHED,
            error: 0,
            segments_out: None,
            shut_down: false,
            traffic: None,
        };
        bench.apply(event);
    }
    bench.audit(vec![]);
    assert_eq!(bench.fold.unlisted_namespaces(), 0);
}

#[test]
fn an_event_without_a_cookie_gives_a_rows_back() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    for number in 1..=2 {
        bench.open(number, tuple(40000, US), SYN_SENT, ESTABLISHED);
    }
    // The dump skips socket 2, whose entry gets the row of socket 1.
    bench.audit(vec![equal(1)]);
    // Socket 2 has no cookie, so the row was not its own.
    bench.change(2, tuple(40000, US), CLOSE_WAIT);
    let mut two = equal(2);
    two.state = CLOSE_WAIT;
    bench.audit(vec![equal(1), two]);
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.tracked, snapshot.established), (2, 1));
    assert_eq!(snapshot.corrections, Corrections::default());
}
