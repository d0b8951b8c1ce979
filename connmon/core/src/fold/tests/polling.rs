//! Walks as the only source.

use super::*;

const US: &str = "198.51.100.7:443";
const DE: &str = "203.0.113.9:50000";

fn polling() -> FoldConfig {
    FoldConfig {
        polling: true,
        traffic: false,
        accepts: false,
        ..config()
    }
}

fn poll(bench: &mut Bench, rows: Vec<Row>) {
    bench.begin(Trigger::Interval);
    bench.namespace(1, rows);
    bench.walk(WalkMessage::End(WalkSummary::default()));
}

#[test]
fn opened_and_closed_are_differences_between_polls() {
    let mut bench = Bench::new(polling());
    let old = row(ESTABLISHED, tuple(22, DE), 0);
    let new = row(ESTABLISHED, tuple(40000, US), 0);
    poll(&mut bench, vec![listen_row(22), old]);
    let flow = bench.country("DE").flows[0];
    assert_eq!(
        (flow.connections, flow.opened),
        (1, 0),
        "the first poll seeds"
    );
    poll(&mut bench, vec![new, listen_row(22), old]);
    let flow = bench.port(443, Direction::Outbound).unwrap().flow;
    assert_eq!((flow.connections, flow.opened, flow.closed), (1, 1, 0));
    poll(&mut bench, vec![listen_row(22), new]);
    let flow = bench.country("DE").flows[0];
    assert_eq!(
        (flow.connections, flow.closed),
        (0, 1),
        "one absence is a close"
    );
    let snapshot = bench.fold.snapshot();
    assert_eq!(
        snapshot.corrections,
        Corrections {
            seeded: 1,
            ..Corrections::default()
        }
    );
    assert_eq!(snapshot.drift, Some(0));
    assert_eq!(snapshot.listeners.len(), 1);
}

#[test]
fn polled_sockets_with_the_same_endpoints_count_one_by_one() {
    let mut bench = Bench::new(polling());
    let equal: Vec<Row> = (1..=4)
        .map(|inode| Row {
            inode,
            ..row(ESTABLISHED, tuple(40000, US), 0)
        })
        .collect();
    poll(&mut bench, equal[..2].to_vec());
    assert_eq!(bench.fold.snapshot().corrections.seeded, 2);
    for (shown, expected) in [
        (&equal[..], (2, 0, 4)),
        (&equal[1..], (2, 1, 3)),
        (&equal[..2], (2, 2, 2)),
        (&[], (2, 4, 0)),
    ] {
        poll(&mut bench, shown.to_vec());
        let flow = bench.country("US").flows[1];
        assert_eq!((flow.opened, flow.closed, flow.connections), expected);
    }
}

#[test]
fn gauges_follow_the_states_of_each_poll() {
    let mut bench = Bench::new(polling());
    poll(&mut bench, vec![row(ESTABLISHED, tuple(40000, US), 0)]);
    poll(&mut bench, vec![row(CLOSE_WAIT, tuple(40000, US), 0)]);
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.established, snapshot.tracked), (0, 1));
    assert_eq!((snapshot.corrections.updated, snapshot.drift), (0, Some(0)));
    assert_eq!(bench.port(443, Direction::Outbound).unwrap().close_wait, 1);
}

#[test]
fn a_namespace_read_in_part_keeps_and_one_that_is_gone_closes() {
    let mut bench = Bench::new(polling());
    bench.begin(Trigger::Startup);
    bench.namespace(1, vec![row(ESTABLISHED, tuple(40000, US), 0)]);
    bench.namespace(2, vec![row(ESTABLISHED, tuple(40000, US), 0)]);
    bench.end();
    assert_eq!(bench.fold.snapshot().established, 2);
    bench.begin(Trigger::Interval);
    bench.namespace_begin(1);
    bench.namespace_end(1, false);
    bench.end();
    let snapshot = bench.fold.snapshot();
    assert_eq!((snapshot.established, snapshot.tracked), (1, 1));
    assert_eq!(bench.country("US").flows[1].closed, 1);
}

#[test]
fn a_failed_read_closes_nothing_and_opens_nothing() {
    let mut bench = Bench::new(polling());
    let rows = vec![row(ESTABLISHED, tuple(40000, US), 0)];
    poll(&mut bench, rows.clone());
    // The namespace is there, but could not be read.
    bench.begin(Trigger::Interval);
    bench.namespace_begin(1);
    bench.walk(WalkMessage::NamespaceEnd {
        netns: 1,
        access: Access::Unaudited,
        complete: false,
    });
    bench.walk(WalkMessage::End(WalkSummary {
        unaudited: 1,
        ..WalkSummary::default()
    }));
    assert_eq!(bench.fold.snapshot().established, 1);
    // Nobody knows which namespaces there are.
    for unlisted in [true, false] {
        bench.begin(Trigger::Interval);
        bench.walk(WalkMessage::End(WalkSummary {
            unaudited: 1,
            unlisted,
            ..WalkSummary::default()
        }));
        assert_eq!(bench.fold.snapshot().established, 1);
    }
    // Some are known, not all.
    bench.begin(Trigger::Interval);
    bench.namespace(2, vec![]);
    bench.walk(WalkMessage::End(WalkSummary {
        unaudited: 1,
        unlisted: true,
        ..WalkSummary::default()
    }));
    assert_eq!(bench.fold.snapshot().established, 1);
    poll(&mut bench, rows);
    let flow = bench.country("US").flows[1];
    assert_eq!((flow.connections, flow.opened, flow.closed), (1, 0, 0));
}

#[test]
fn opens_at_the_cap_are_counted_once_whether_they_get_a_place_or_not() {
    let mut bench = Bench::new(FoldConfig {
        connections_max: 2,
        ..polling()
    });
    let rows: Vec<Row> = (1..=6)
        .map(|n| row(ESTABLISHED, tuple(40000 + n, US), 0))
        .collect();
    let stats = |bench: &Bench| {
        let snapshot = bench.fold.snapshot();
        let flow = bench.port(443, Direction::Outbound).unwrap().flow;
        (
            (flow.opened, flow.closed, flow.connections),
            (snapshot.untracked, snapshot.table_overflow),
            snapshot.corrections.added,
        )
    };
    // Of three seeds one finds no place, and that is no open.
    poll(&mut bench, rows[..3].to_vec());
    assert_eq!(stats(&bench), ((0, 0, 2), (1, 0), 0));
    // Two are new, once.
    for _ in 0..2 {
        poll(&mut bench, rows[..5].to_vec());
        assert_eq!(stats(&bench), ((2, 0, 2), (3, 2), 0));
    }
    // Two close; their places are free from the next poll on, when two that
    // had none take them, as seen before.
    poll(&mut bench, rows[2..5].to_vec());
    assert_eq!(stats(&bench), ((2, 2, 0), (3, 2), 0));
    poll(&mut bench, rows[2..5].to_vec());
    assert_eq!(stats(&bench), ((2, 2, 2), (1, 2), 2));
    // One more opens at the cap.
    poll(&mut bench, rows[2..6].to_vec());
    assert_eq!(stats(&bench), ((3, 2, 2), (2, 3), 2));
    // Places for all, and then a new one that takes one.
    poll(&mut bench, rows[4..5].to_vec());
    assert_eq!(stats(&bench), ((3, 4, 0), (1, 3), 2));
    poll(&mut bench, rows[3..5].to_vec());
    assert_eq!(stats(&bench), ((4, 4, 2), (0, 3), 3));
}

#[test]
fn a_listener_younger_than_the_first_rows_is_known() {
    let mut bench = Bench::new(polling());
    poll(&mut bench, vec![]);
    let served = tuple(40001, DE);
    let (accepted, listener) = (row(ESTABLISHED, served, 0), listen_row(40001));
    poll(&mut bench, vec![accepted, accepted, listener]);
    let flow = bench.port(40001, Direction::Inbound).unwrap().flow;
    assert_eq!((flow.connections, flow.opened), (1, 1));
    poll(&mut bench, vec![listener]);
    let flow = bench.port(40001, Direction::Inbound).unwrap().flow;
    assert_eq!((flow.connections, flow.closed), (0, 1));
}
