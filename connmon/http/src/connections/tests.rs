use tokio::sync::Semaphore;

use super::*;

fn limits() -> Limits {
    Limits {
        connections: 4,
        ..Limits::default()
    }
}

/// A request whose response begins at once.
fn respond(connection: &Arc<Connection>, permit: Option<OwnedSemaphorePermit>) -> InFlight {
    let request = connection.request();
    request.response_begins(permit);
    request
}

/// When the connection will be closed.
fn deadline(connection: &Connection) -> Option<Instant> {
    connection.activity().deadline(&limits())
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn deadlines_follow_what_the_connection_does() {
    let limits = limits();
    let start = Instant::now();
    let until = |second| tokio::time::sleep_until(start + secs(second));
    let connection = Connection::new(peer(1));
    assert_eq!(deadline(&connection), Some(start + limits.handshake));
    until(1).await;
    connection.handshaken(false);
    // Whether bytes come or not, the first header is due at the same time …
    let due = Some(start + secs(1) + limits.header);
    assert_eq!(deadline(&connection), due);
    until(5).await;
    connection.bytes_read();
    assert_eq!(deadline(&connection), due);
    // … nothing is due while the server works …
    let request = connection.request();
    assert_eq!(deadline(&connection), None);
    request.allowed();
    assert_eq!(deadline(&connection), None);
    // … the response is due as a whole, however slowly it is read …
    until(6).await;
    request.response_begins(None);
    until(20).await;
    connection.flushed();
    let due = Some(start + secs(6) + limits.write);
    assert_eq!(deadline(&connection), due);
    // … also what the body has given but the socket has not taken …
    drop(request);
    assert_eq!(deadline(&connection), due);
    // … then it may idle, until the first byte of the next request.
    until(21).await;
    connection.flushed();
    assert_eq!(deadline(&connection), Some(start + secs(21) + limits.idle));
    for second in [60, 61] {
        until(second).await;
        connection.bytes_read();
        let due = Some(start + secs(60) + limits.header);
        assert_eq!(deadline(&connection), due);
    }
}

#[tokio::test(start_paused = true)]
async fn http2_frames_are_not_requests() {
    let limits = limits();
    let start = Instant::now();
    let connection = Connection::new(peer(1));
    connection.handshaken(true);
    tokio::time::advance(secs(1)).await;
    connection.bytes_read();
    assert_eq!(deadline(&connection), Some(start + limits.header));
    tokio::time::advance(secs(1)).await;
    drop(respond(&connection, None));
    connection.flushed();
    tokio::time::advance(secs(1)).await;
    connection.bytes_read();
    assert_eq!(deadline(&connection), Some(start + secs(2) + limits.idle));
}

/// A client that always has a response under way, each of them fast.
#[tokio::test(start_paused = true)]
async fn overlapping_responses_have_a_time_each() {
    let limits = limits();
    let connection = Connection::new(peer(1));
    connection.handshaken(true);
    let mut last = respond(&connection, None);
    for _ in 1..600 {
        tokio::time::advance(secs(1)).await;
        // The last one ends after the next has begun.
        last = respond(&connection, None);
        connection.flushed();
        assert_eq!(deadline(&connection), Some(Instant::now() + limits.write));
    }
    // One that is not read has no more than its own time.
    tokio::time::advance(secs(1)).await;
    drop(last);
    connection.flushed();
    let stuck = Instant::now();
    let _unread = respond(&connection, None);
    for _ in 1..20 {
        tokio::time::advance(secs(1)).await;
        drop(respond(&connection, None));
        connection.flushed();
    }
    assert_eq!(deadline(&connection), Some(stuck + limits.write));
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

fn is_closed(slot: &Slot) -> bool {
    let table = slot.connections.table();
    !table.iter().any(|it| Arc::ptr_eq(it, &slot.connection))
}

#[tokio::test(start_paused = true)]
async fn the_request_begun_first_gives_way() {
    let connections = Connections::new(Arc::new(limits()));
    let mut slots = Vec::new();
    for last in 1..=4 {
        let slot = connections.admit(peer(last)).await.unwrap();
        slot.connection.handshaken(false);
        slots.push(slot);
        tokio::time::advance(secs(1)).await;
    }
    // Bytes of a header that does not end make it no younger …
    slots[0].connection.bytes_read();
    let fifth = connections.admit(peer(5)).await.unwrap();
    assert!(is_closed(&slots[0]));
    // … and one that waits for our answer never gives way.
    let working = slots[1].connection.request();
    working.allowed();
    let _sixth = connections.admit(peer(6)).await.unwrap();
    assert!(!is_closed(&slots[1]));
    assert!(is_closed(&slots[2]));
    drop(fifth);
    assert_eq!(connections.table().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn the_client_with_most_connections_gives_way() {
    let connections = Connections::new(Arc::new(limits()));
    let oldest = connections.admit(peer(9)).await.unwrap();
    tokio::time::advance(secs(100)).await;
    let mut network = Vec::new();
    for last in 1..=20 {
        let address = format!("2001:db8::{last}:1").parse().unwrap();
        network.push(connections.admit(address).await.unwrap());
    }
    let closed = network.iter().filter(|slot| is_closed(slot)).count();
    assert_eq!(closed, 17, "three of one network's beside the other client");
    let second = connections.admit(peer(9)).await.unwrap();
    let third = connections.admit(peer(8)).await.unwrap();
    // Two clients had two each: the oldest of all four.
    assert!(is_closed(&oldest));
    assert!(!is_closed(&second) && !is_closed(&third));
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
async fn a_flood_of_addresses_leaves_time_for_a_request() {
    let connections = Connections::new(Arc::new(limits()));
    let mut flood = Vec::new();
    for last in 1..=4 {
        flood.push(connections.admit(peer(last)).await.unwrap());
    }
    let client = connections.admit(peer(200)).await.unwrap();
    let request = Instant::now() + Duration::from_millis(20);
    let endless = async {
        for last in (5..200).cycle() {
            flood.push(connections.admit(peer(last)).await.unwrap());
        }
    };
    assert!(tokio::time::timeout_at(request, endless).await.is_err());
    assert!(!is_closed(&client));
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
    assert!(!slots.iter().any(is_closed));
}

#[tokio::test(start_paused = true)]
async fn full_of_work_is_full() {
    let connections = Connections::new(Arc::new(limits()));
    let mut slots = Vec::new();
    for last in 1..=4 {
        slots.push(connections.admit(peer(last)).await.unwrap());
    }
    let requests: Vec<_> = slots.iter().map(|slot| slot.connection.request()).collect();
    requests.iter().for_each(InFlight::allowed);
    tokio::time::advance(secs(100)).await;
    assert!(connections.admit(peer(5)).await.is_none());
    connections.close_overdue();
    assert_eq!(connections.table().len(), 4);
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
        let responding = slot.connection.request();
        responding.response_begins(Some(permit));
        readers.push((slot, responding));
        tokio::time::advance(limits.fresh).await;
    }
    // Each would have two then: there is no one to blame yet.
    assert!(!connections.close_slow_reader(peer(1)));
    // Another would have one, and the second client has two.
    assert!(connections.close_slow_reader(peer(3)));
    assert!(is_closed(&readers[1].0));
    // Now everyone would have one.
    assert!(!connections.close_slow_reader(peer(3)));
    tokio::time::advance(limits.slow_reader).await;
    assert!(connections.close_slow_reader(peer(3)));
    assert!(is_closed(&readers[0].0));
}

#[tokio::test(start_paused = true)]
async fn a_scrape_is_in_flight_until_its_end_is_flushed() {
    let permits = Arc::new(Semaphore::new(2));
    let permit = || Some(Arc::clone(&permits).try_acquire_owned().unwrap());
    let connection = Connection::new(peer(1));
    let first = respond(&connection, permit());
    let second = respond(&connection, permit());
    drop(first);
    assert_eq!(permits.available_permits(), 0);
    assert_eq!(scrapes(&[Arc::clone(&connection)]).len(), 2);
    connection.flushed();
    assert_eq!(permits.available_permits(), 1);
    drop(second);
    // Closed before that.
    drop(connection);
    assert_eq!(permits.available_permits(), 2);
    // A file of the page is none.
    let connection = Connection::new(peer(1));
    let _page = respond(&connection, None);
    assert_eq!(scrapes(&[Arc::clone(&connection)]).len(), 0);
    assert!(connection.is_responding());
}
