//! Bytes, retransmits and round-trip times.

use super::*;

const US: &str = "198.51.100.7:443";

fn sampled(state: u8, cookie: Cookie, traffic: Traffic) -> Row {
    let mut row = row(state, tuple(40000, US), cookie);
    row.traffic = Some(traffic);
    row
}

/// Of a connection that was opened by connect(), whose SYN counts.
fn of_active(received: u64, sent: u64, retransmitted: u32, srtt_us: u32) -> Traffic {
    stats(received, sent + SYN_BYTES, retransmitted, srtt_us)
}

fn sample(bench: &mut Bench, row: Row) {
    bench.walk(WalkMessage::Begin(Walk {
        trigger: Trigger::Interval,
        traffic: true,
        audit: false,
    }));
    bench.namespace(1, vec![row]);
    bench.end();
}

fn moved(bench: &Bench) -> (u64, u64, u64) {
    let flow = bench.country("US").flows[1];
    (
        flow.received_bytes,
        flow.sent_bytes,
        flow.retransmitted_segments,
    )
}

fn close(bench: &mut Bench, cookie: Cookie, traffic: Traffic) {
    bench.close_with(
        1,
        cookie,
        tuple(40000, US),
        ESTABLISHED,
        0,
        Some(1),
        Some(traffic),
    );
}

#[test]
fn a_born_connection_counts_from_zero_and_never_twice() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
    sample(
        &mut bench,
        sampled(ESTABLISHED, 5, of_active(100, 200, 1, 900)),
    );
    assert_eq!(moved(&bench), (100, 200, 1));
    sample(
        &mut bench,
        sampled(ESTABLISHED, 5, of_active(100, 200, 1, 900)),
    );
    assert_eq!(moved(&bench), (100, 200, 1));
    close(&mut bench, 5, of_active(1000, 500, 3, 800));
    assert_eq!(moved(&bench), (1000, 500, 3));
}

#[test]
fn what_moved_before_start_is_not_counted() {
    let mut bench = Bench::new(config());
    bench.startup(vec![sampled(ESTABLISHED, 5, stats(7000, 8000, 9, 100))]);
    assert_eq!(moved(&bench), (0, 0, 0));
    close(&mut bench, 5, stats(7010, 8020, 9, 100));
    assert_eq!(moved(&bench), (10, 20, 0));
}

#[test]
fn a_seed_counts_bytes_from_its_first_sample() {
    let mut bench = Bench::new(config());
    bench.startup(vec![row(ESTABLISHED, tuple(40000, US), 5)]);
    sample(
        &mut bench,
        sampled(ESTABLISHED, 5, stats(7000, 8000, 9, 100)),
    );
    sample(
        &mut bench,
        sampled(ESTABLISHED, 5, stats(7001, 8002, 9, 100)),
    );
    assert_eq!(moved(&bench), (1, 2, 0));
    let mut bench = Bench::new(config());
    bench.startup(vec![row(ESTABLISHED, tuple(40000, US), 5)]);
    close(&mut bench, 5, stats(7000, 8000, 9, 100));
    assert_eq!(moved(&bench), (0, 0, 0));
}

#[test]
fn without_a_single_sample_a_close_counts_in_full_what_was_born_and_nothing_of_a_seed() {
    for old in [SYN_SENT, SYN_RECV] {
        let mut bench = Bench::new(config());
        bench.startup(vec![]);
        bench.open(1, tuple(40000, US), old, ESTABLISHED);
        let stats = if old == SYN_SENT { of_active } else { stats };
        close(&mut bench, 5, stats(7000, 8000, 9, 100));
        let flow = bench.country("US").flows[usize::from(old == SYN_SENT)];
        let moved = (
            flow.received_bytes,
            flow.sent_bytes,
            flow.retransmitted_segments,
        );
        assert_eq!(moved, (7000, 8000, 9));
    }
    // Seeds: of the startup walk, met in an event before it, and one that only
    // a later walk found.
    let row = row(ESTABLISHED, tuple(40000, US), 5);
    for seed in [
        (|bench, row| bench.startup(vec![row])) as fn(&mut Bench, Row),
        |bench, row| bench.change(1, row.tuple, CLOSE_WAIT),
        |bench, row| {
            bench.startup(vec![]);
            bench.audit(vec![row]);
        },
    ] {
        let mut bench = Bench::new(config());
        seed(&mut bench, row);
        assert_eq!(bench.fold.snapshot().tracked, 1);
        close(&mut bench, 5, stats(7000, 8000, 9, 100));
        let snapshot = bench.fold.snapshot();
        assert_eq!(snapshot.tracked, 0);
        for flow in bench.country("US").flows {
            let bytes = flow.received_bytes + flow.sent_bytes;
            assert_eq!((bytes, flow.retransmitted_segments), (0, 0));
        }
    }
}

#[test]
fn received_bytes_are_sampled_where_no_fin_can_be_among_them() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
    for state in [CLOSE_WAIT, LAST_ACK, CLOSING] {
        sample(&mut bench, sampled(state, 5, of_active(1001, 200, 0, 0)));
    }
    assert_eq!(moved(&bench), (0, 200, 0));
    close(&mut bench, 5, of_active(1000, 200, 0, 0));
    assert_eq!(moved(&bench), (1000, 200, 0));
}

#[test]
fn counters_that_went_back_add_nothing() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
    sample(
        &mut bench,
        sampled(ESTABLISHED, 5, of_active(1001, 500, 4, 0)),
    );
    close(&mut bench, 5, of_active(1000, 0, 0, 0));
    assert_eq!(moved(&bench), (1001, 500, 4));
}

#[test]
fn a_row_older_than_an_event_is_not_sampled() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    bench.begin(Trigger::Interval);
    bench.namespace_begin(1);
    bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
    bench.rows(0, vec![sampled(ESTABLISHED, 0, of_active(9, 9, 9, 9))]);
    bench.namespace_end(1, true);
    bench.end();
    assert_eq!(moved(&bench), (0, 0, 0));
    close(&mut bench, 0, of_active(4, 5, 0, 0));
    assert_eq!(moved(&bench), (4, 5, 0));
}

#[test]
fn round_trips_are_observed_where_bytes_moved() {
    let mut bench = Bench::new(config());
    bench.startup(vec![]);
    let count = |bench: &Bench| bench.fold.snapshot().rtt[1].counts.iter().sum::<u64>();
    bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
    sample(
        &mut bench,
        sampled(ESTABLISHED, 5, of_active(100, 0, 0, 2000)),
    );
    assert_eq!(count(&bench), 1);
    sample(
        &mut bench,
        sampled(ESTABLISHED, 5, of_active(100, 0, 0, 2000)),
    );
    assert_eq!(count(&bench), 1, "idle");
    close(&mut bench, 5, of_active(100, 0, 0, 2000));
    assert_eq!(count(&bench), 1, "idle to its end");
    // A short one is observed at its close, bytes or not, if there is one.
    bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
    close(&mut bench, 0, of_active(0, 0, 0, 3000));
    bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
    close(&mut bench, 0, of_active(0, 0, 0, 0));
    assert_eq!(count(&bench), 2);
    let rtt = bench.country("US").rtt;
    assert_eq!((rtt.count, rtt.sum_ns), (2, 5 * MS));
}

#[test]
fn a_source_without_traffic_counts_none() {
    let mut bench = Bench::new(FoldConfig {
        traffic: false,
        ..config()
    });
    bench.open(1, tuple(40000, US), SYN_SENT, ESTABLISHED);
    close(&mut bench, 0, stats(4, 5, 6, 7));
    assert_eq!(moved(&bench), (0, 0, 0));
    assert!(!bench.fold.snapshot().traffic_known);
}
