use tokio::sync::Semaphore;

use super::*;

fn limits() -> Limits {
    Limits {
        connections: 4,
        ..Limits::default()
    }
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn deadlines_follow_what_the_connection_does() {
    let limits = limits();
    let start = Instant::now();
    let mut activity = Activity::new(start);
    assert_eq!(activity.deadline(&limits), Some(start + limits.handshake));
    activity.handshaken(false, start + secs(1));
    // Silent or dribbling, the first header is due at the same time …
    assert_eq!(
        activity.deadline(&limits),
        Some(start + secs(1) + limits.header)
    );
    activity.bytes_read(start + secs(4));
    activity.bytes_read(start + secs(5));
    assert_eq!(
        activity.deadline(&limits),
        Some(start + secs(1) + limits.header)
    );
    // … nothing is due while we work …
    activity.handling += 1;
    assert_eq!(activity.deadline(&limits), None);
    activity.handling -= 1;
    // … the response is due as a whole, however the client dribbles …
    let response = activity.response_begins(start + secs(6), None);
    activity.flushed(start + secs(20));
    assert_eq!(
        activity.deadline(&limits),
        Some(start + secs(6) + limits.write)
    );
    // … also what the body has given but the socket has not taken …
    activity.response_ends(response);
    assert_eq!(
        activity.deadline(&limits),
        Some(start + secs(6) + limits.write)
    );
    // … then it may idle, until the first byte of the next request.
    activity.flushed(start + secs(21));
    assert_eq!(
        activity.deadline(&limits),
        Some(start + secs(21) + limits.idle)
    );
    activity.bytes_read(start + secs(60));
    activity.bytes_read(start + secs(61));
    assert_eq!(
        activity.deadline(&limits),
        Some(start + secs(60) + limits.header)
    );
}

#[test]
fn http2_frames_are_not_requests() {
    let limits = limits();
    let start = Instant::now();
    let mut activity = Activity::new(start);
    activity.handshaken(true, start);
    activity.bytes_read(start + secs(1));
    assert_eq!(activity.deadline(&limits), Some(start + limits.header));
    let response = activity.response_begins(start + secs(2), None);
    activity.response_ends(response);
    activity.flushed(start + secs(2));
    activity.bytes_read(start + secs(3));
    assert_eq!(
        activity.deadline(&limits),
        Some(start + secs(2) + limits.idle)
    );
}

/// A client that always has a response under way, each of them fast.
#[test]
fn overlapping_responses_have_a_time_each() {
    let limits = limits();
    let start = Instant::now();
    let mut activity = Activity::new(start);
    activity.handshaken(true, start);
    let mut last = activity.response_begins(start, None);
    for second in 1..600 {
        let now = start + secs(second);
        let next = activity.response_begins(now, None);
        activity.response_ends(last);
        activity.flushed(now);
        assert_eq!(activity.deadline(&limits), Some(now + limits.write));
        last = next;
    }
    // One that is not taken has no more than its own time.
    let stuck = start + secs(600);
    activity.response_ends(last);
    activity.flushed(stuck);
    let _unread = activity.response_begins(stuck, None);
    for second in 601..620 {
        let other = activity.response_begins(start + secs(second), None);
        activity.response_ends(other);
        activity.flushed(start + secs(second));
    }
    assert_eq!(activity.deadline(&limits), Some(stuck + limits.write));
}

#[test]
fn one_ipv6_network_is_one_client() {
    let client = |text: &str| client_of(text.parse().unwrap());
    for (one, other, same) in [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff", true),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", false),
        ("2001:db8::1", "2001:db9::1", false),
        ("::ffff:10.0.0.1", "10.0.0.1", true),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", false),
        ("10.0.0.1", "10.0.0.2", false),
    ] {
        assert_eq!(client(one) == client(other), same, "{one} {other}");
    }
}

fn peer(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fn is_cut(slot: &mut Slot) -> bool {
    slot.order.try_recv().is_ok()
}

#[tokio::test(start_paused = true)]
async fn the_request_begun_first_gives_way() {
    let connections = Connections::new(Arc::new(limits()));
    let mut slots = Vec::new();
    for last in 1..=4 {
        let slot = connections.admit(peer(last)).await.unwrap();
        slot.watch.handshaken(false);
        slots.push(slot);
        tokio::time::advance(secs(1)).await;
    }
    // Bytes of a header that does not end make it no younger …
    slots[0].watch.bytes_read();
    let fifth = connections.admit(peer(5)).await.unwrap();
    assert!(is_cut(&mut slots[0]));
    // … and one that waits for our answer never gives way.
    let _working = slots[1].watch.work();
    let _sixth = connections.admit(peer(6)).await.unwrap();
    assert!(!is_cut(&mut slots[1]));
    assert!(is_cut(&mut slots[2]));
    drop(fifth);
    assert_eq!(connections.table().entries.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn the_client_with_most_connections_gives_way() {
    let connections = Connections::new(Arc::new(limits()));
    let mut oldest = connections.admit(peer(9)).await.unwrap();
    tokio::time::advance(secs(100)).await;
    let mut network = Vec::new();
    for last in 1..=20 {
        let address = format!("2001:db8::{last}:1").parse().unwrap();
        network.push(connections.admit(address).await.unwrap());
    }
    let cut = network.iter_mut().map(is_cut).filter(|cut| *cut).count();
    assert_eq!(cut, 17, "three of one network's beside the other client");
    let mut second = connections.admit(peer(9)).await.unwrap();
    let mut third = connections.admit(peer(8)).await.unwrap();
    // Two clients had two each: the oldest of all four.
    assert!(is_cut(&mut oldest));
    assert!(!is_cut(&mut second) && !is_cut(&mut third));
}

#[tokio::test(start_paused = true)]
async fn a_newcomer_has_time_to_send_its_request() {
    let limits = limits();
    let connections = Connections::new(Arc::new(limits.clone()));
    let mut slots = Vec::new();
    for _ in 0..4 {
        slots.push(connections.admit(peer(1)).await.unwrap());
    }
    let began = Instant::now();
    let _fifth = connections.admit(peer(1)).await.unwrap();
    assert!(began.elapsed() >= limits.fresh, "{:?}", began.elapsed());
}

/// Whose clients have one connection each, so that none has the most.
#[tokio::test(start_paused = true)]
async fn a_flood_from_many_addresses_leaves_time_for_a_request() {
    let connections = Connections::new(Arc::new(limits()));
    let mut flood = Vec::new();
    for last in 1..=4 {
        flood.push(connections.admit(peer(last)).await.unwrap());
    }
    let mut client = connections.admit(peer(200)).await.unwrap();
    let request = Instant::now() + Duration::from_millis(20);
    let endless = async {
        for last in (5..200).cycle() {
            flood.push(connections.admit(peer(last)).await.unwrap());
        }
    };
    assert!(tokio::time::timeout_at(request, endless).await.is_err());
    assert!(!is_cut(&mut client));
}

#[tokio::test(start_paused = true)]
async fn a_place_given_back_is_taken_at_once() {
    let limits = limits();
    let connections = Connections::new(Arc::new(limits.clone()));
    let mut slots = Vec::new();
    for last in 1..=4 {
        slots.push(connections.admit(peer(last)).await.unwrap());
    }
    let began = Instant::now();
    let give_back = async {
        tokio::time::sleep(Duration::from_millis(1)).await;
        slots.pop();
    };
    let (newcomer, ()) = tokio::join!(connections.admit(peer(5)), give_back);
    assert!(newcomer.is_some());
    assert!(began.elapsed() < limits.fresh, "{:?}", began.elapsed());
    assert!(!slots.iter_mut().any(is_cut));
}

#[tokio::test(start_paused = true)]
async fn full_of_work_is_full() {
    let connections = Connections::new(Arc::new(limits()));
    let mut slots = Vec::new();
    for last in 1..=4 {
        slots.push(connections.admit(peer(last)).await.unwrap());
    }
    let _handling: Vec<Handling> = slots.iter().map(|slot| slot.watch.request()).collect();
    let _working: Vec<Working> = slots.iter().map(|slot| slot.watch.work()).collect();
    tokio::time::advance(secs(100)).await;
    assert!(connections.admit(peer(5)).await.is_none());
    connections.cut_overdue();
    assert_eq!(connections.table().entries.len(), 4);
}

#[tokio::test(start_paused = true)]
async fn the_client_with_most_slow_readers_gives_way() {
    let limits = limits();
    let connections = Connections::new(Arc::new(limits.clone()));
    let permits = Arc::new(Semaphore::new(3));
    let mut readers = Vec::new();
    for last in [1, 2, 2] {
        let slot = connections.admit(peer(last)).await.unwrap();
        let permit = Arc::clone(&permits).try_acquire_owned().unwrap();
        let responding = slot.watch.response(Some(permit));
        readers.push((slot, responding));
        tokio::time::advance(limits.fresh).await;
    }
    // Each would have two then: there is no one to blame yet.
    assert!(!connections.cut_slow_reader(peer(1)));
    // Another would have one, and the second client has two.
    assert!(connections.cut_slow_reader(peer(3)));
    assert!(is_cut(&mut readers[1].0));
    // Now everyone would have one.
    assert!(!connections.cut_slow_reader(peer(3)));
    tokio::time::advance(limits.slow_reader).await;
    assert!(connections.cut_slow_reader(peer(3)));
    assert!(is_cut(&mut readers[0].0));
}

#[test]
fn a_scrape_is_in_flight_until_its_end_is_flushed() {
    let permits = Arc::new(Semaphore::new(2));
    let permit = || Some(Arc::clone(&permits).try_acquire_owned().unwrap());
    let now = Instant::now();
    let mut activity = Activity::new(now);
    let (first, second) = (
        activity.response_begins(now, permit()),
        activity.response_begins(now, permit()),
    );
    activity.response_ends(first);
    assert_eq!(permits.available_permits(), 0);
    assert_eq!(activity.scrapes_since().count(), 2);
    activity.flushed(now);
    assert_eq!(permits.available_permits(), 1);
    activity.response_ends(second);
    // Cut before that.
    drop(activity);
    assert_eq!(permits.available_permits(), 2);
    // A file of the page is none.
    let mut activity = Activity::new(now);
    activity.response_begins(now, None);
    assert_eq!(activity.scrapes_since().count(), 0);
    assert_eq!(activity.response_since(), Some(now));
}
