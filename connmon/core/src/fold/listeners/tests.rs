use super::*;
use crate::event::Tuple;

fn owner(pid: u32, name: &[u8]) -> Owner {
    let mut owner = Owner {
        pid,
        ..Owner::default()
    };
    owner.comm[..name.len()].copy_from_slice(name);
    owner
}

fn row(address: &str, port: u16, queue: (u32, u32), owner: Owner) -> Row {
    let local: IpAddr = address.parse().unwrap();
    Row {
        state: connmon_common::state::LISTEN,
        tuple: Tuple {
            local,
            local_port: port,
            remote: local,
            remote_port: 0,
        },
        cookie: 0,
        inode: 1,
        id: 0,
        receive_queue: queue.0,
        send_queue: queue.1,
        traffic: None,
        owner,
    }
}

fn walk(listeners: &mut Listeners, netns: NetnsId, rows: &[Row]) {
    listeners.begin();
    for row in rows {
        listeners.row(netns, false, row);
    }
    listeners.end_namespace(netns, true, true);
    listeners.end(|other| other == netns, true);
}

const ANY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);

#[test]
fn a_reuseport_group_is_one_series_with_the_lowest_pid() {
    let mut listeners = Listeners::new(true, 10, 1);
    for pid in [30, 20, 40] {
        listeners.listen(1, ANY, 80, &owner(pid, b"nginx"));
    }
    walk(
        &mut listeners,
        1,
        &[
            row("0.0.0.0", 80, (1, 128), owner(20, b"nginx")),
            row("0.0.0.0", 80, (2, 128), owner(40, b"nginx")),
            row("::", 80, (0, 5), owner(50, b"other")),
        ],
    );
    let rows = listeners.snapshot();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0].address, "0.0.0.0");
    assert_eq!((rows[0].pid, rows[0].sockets), (20, 2));
    assert_eq!((rows[0].queue_length, rows[0].queue_limit), (3, Some(256)));
    assert!(rows[0].host);
    assert_eq!(
        (rows[1].address.as_str(), rows[1].process.as_str()),
        ("::", "other")
    );
}

#[test]
fn a_queue_limit_is_known_once_a_table_told_it() {
    let mut listeners = Listeners::new(true, 10, 1);
    let limit = |listeners: &Listeners| listeners.snapshot()[0].queue_limit;
    listeners.listen(1, ANY, 80, &owner(1, b"a"));
    assert_eq!(limit(&listeners), None, "no table was read");
    // /proc does not have it.
    listeners.begin();
    listeners.row(1, false, &row("0.0.0.0", 80, (0, 0), owner(1, b"a")));
    listeners.end_namespace(1, true, false);
    assert_eq!(limit(&listeners), None);
    // sock_diag does, and 0 is a limit.
    walk(
        &mut listeners,
        1,
        &[row("0.0.0.0", 80, (0, 0), owner(1, b"a"))],
    );
    assert_eq!(limit(&listeners), Some(0));
}

#[test]
fn unlisten_ends_a_group_and_an_older_row_does_not_bring_it_back() {
    let mut listeners = Listeners::new(true, 10, 1);
    listeners.listen(1, ANY, 80, &owner(1, b"a"));
    listeners.begin();
    listeners.unlisten(1, ANY, 80);
    listeners.row(1, false, &row("0.0.0.0", 80, (0, 1), owner(1, b"a")));
    listeners.end_namespace(1, true, true);
    assert!(listeners.snapshot().is_empty());
}

#[test]
fn two_absences_end_a_group_one_does_not() {
    let mut listeners = Listeners::new(true, 10, 1);
    let present = [row("0.0.0.0", 80, (0, 1), owner(0, b""))];
    walk(&mut listeners, 1, &present);
    assert_eq!(listeners.snapshot()[0].process, "unknown");
    walk(&mut listeners, 1, &[]);
    walk(&mut listeners, 1, &present);
    walk(&mut listeners, 1, &[]);
    assert_eq!(listeners.snapshot().len(), 1);
    walk(&mut listeners, 1, &[]);
    assert!(listeners.snapshot().is_empty());
    walk(&mut listeners, 2, &present);
    walk(&mut listeners, 1, &[]);
    walk(&mut listeners, 1, &[]);
    assert!(listeners.snapshot().is_empty(), "its namespace is gone");
}

/// A walk that reads one namespace, under a surrogate id for it.
fn walk_surrogate(listeners: &mut Listeners, surrogate: NetnsId, rows: &[Row]) {
    listeners.begin();
    for row in rows {
        listeners.row(surrogate, true, row);
    }
    listeners.end_namespace(surrogate, true, true);
    listeners.end(|other| other == surrogate, true);
}

#[test]
fn a_listener_with_a_surrogate_id_joins_events() {
    const SURROGATE: NetnsId = 4_000_000_000;
    let mut listeners = Listeners::new(true, 10, 1);
    let rows = [row("0.0.0.0", 80, (0, 1), owner(0, b""))];
    listeners.listen(7, ANY, 80, &owner(20, b"nginx"));
    walk_surrogate(&mut listeners, SURROGATE, &rows);
    let seen = listeners.snapshot();
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!((seen[0].netns, seen[0].sockets), (SURROGATE, 1));
    assert_eq!((seen[0].process.as_str(), seen[0].pid), ("nginx", 20));
    // Further events of that namespace mean the same group.
    listeners.listen(7, ANY, 80, &owner(10, b"nginx"));
    let seen = listeners.snapshot();
    assert_eq!((seen.len(), seen[0].sockets, seen[0].pid), (1, 2, 10));
    // Another namespace's do not.
    listeners.listen(8, ANY, 80, &owner(30, b"caddy"));
    listeners.unlisten(8, ANY, 80);
    listeners.unlisten(7, ANY, 80);
    assert_eq!(listeners.snapshot()[0].sockets, 1);
    listeners.unlisten(7, ANY, 80);
    assert!(listeners.snapshot().is_empty());
}

#[test]
fn a_listener_of_before_under_a_surrogate_ends_with_its_event() {
    let mut listeners = Listeners::new(true, 10, 1);
    let rows = [row("0.0.0.0", 80, (0, 1), owner(0, b""))];
    walk_surrogate(&mut listeners, 4_000_000_000, &rows);
    listeners.unlisten(7, ANY, 81);
    assert_eq!(listeners.snapshot().len(), 1);
    listeners.unlisten(7, ANY, 80);
    assert!(listeners.snapshot().is_empty());
    // Of two, the walks find which.
    let mut listeners = Listeners::new(true, 10, 1);
    listeners.begin();
    for surrogate in [4_000_000_000, 4_000_000_001] {
        listeners.row(surrogate, true, &rows[0]);
        listeners.end_namespace(surrogate, true, true);
    }
    listeners.end(|other| other != 7, true);
    listeners.unlisten(7, ANY, 80);
    assert_eq!(listeners.snapshot().len(), 2);
}

#[test]
fn a_listener_goes_to_the_surrogate_that_is_new_and_with_its_namespace() {
    let mut listeners = Listeners::new(true, 10, 1);
    let rows = [row("0.0.0.0", 80, (0, 1), owner(0, b""))];
    let read = |listeners: &mut Listeners, surrogates: &[NetnsId]| {
        listeners.begin();
        for &surrogate in surrogates {
            listeners.row(surrogate, true, &rows[0]);
            listeners.end_namespace(surrogate, true, true);
        }
        listeners.end(|other| surrogates.contains(&other), true);
    };
    read(&mut listeners, &[4_000_000_001, 4_000_000_003]);
    listeners.listen(7, ANY, 80, &owner(20, b"nginx"));
    let all = [4_000_000_001, 4_000_000_002, 4_000_000_003];
    read(&mut listeners, &all);
    let seen: Vec<_> = (listeners.snapshot().iter())
        .map(|row| (row.netns, row.pid))
        .collect();
    assert_eq!(seen, [(all[0], 0), (all[1], 20), (all[2], 0)]);
    // A namespace that ended, and an event that meant none of the rest.
    listeners.listen(9, ANY, 81, &owner(30, b"caddy"));
    for _ in 0..3 {
        read(&mut listeners, &all[..2]);
    }
    assert_eq!(listeners.snapshot().len(), 2);
}

#[test]
fn a_listener_that_is_told_while_a_surrogate_is_read_waits_for_the_next_walk() {
    let mut listeners = Listeners::new(true, 10, 1);
    let rows = [row("0.0.0.0", 80, (0, 1), owner(0, b""))];
    listeners.begin();
    listeners.row(4_000_000_000, true, &rows[0]);
    listeners.listen(7, ANY, 80, &owner(20, b"nginx"));
    listeners.end_namespace(4_000_000_000, true, true);
    listeners.end(|other| other != 7, true);
    assert_eq!(listeners.snapshot().len(), 2, "it may be another's");
    walk_surrogate(&mut listeners, 4_000_000_000, &rows);
    assert_eq!(listeners.snapshot().len(), 1);
}

#[test]
fn the_inventory_is_bounded_and_can_be_off() {
    let mut listeners = Listeners::new(true, 2, 1);
    for port in 1..=5 {
        listeners.listen(1, ANY, port, &owner(1, b"a"));
    }
    assert_eq!(listeners.snapshot().len(), 2);
    assert_eq!(listeners.overflow, 3);
    let mut off = Listeners::new(false, 2, 1);
    off.listen(1, ANY, 1, &owner(1, b"a"));
    assert!(off.snapshot().is_empty());
    assert_eq!(off.overflow, 0);
}

#[test]
fn a_group_without_a_place_is_counted_once_while_it_has_none() {
    let mut listeners = Listeners::new(true, 2, 1);
    let rows: Vec<Row> = (1..=5)
        .map(|port| row("0.0.0.0", port, (0, 1), owner(1, b"a")))
        .collect();
    listeners.listen(1, ANY, 3, &owner(1, b"a"));
    listeners.listen(1, ANY, 4, &owner(1, b"a"));
    listeners.listen(1, ANY, 5, &owner(1, b"a"));
    for _ in 0..3 {
        walk(&mut listeners, 1, &rows);
        assert_eq!(listeners.overflow, 3);
    }
    // A namespace read in part proves nothing about what it did not show.
    listeners.begin();
    listeners.end_namespace(1, false, true);
    listeners.end(|_| true, true);
    walk(&mut listeners, 1, &rows);
    assert_eq!(listeners.overflow, 3);
    // One that gets a place, loses it and comes back is a new loss, as is
    // one that was gone meanwhile.
    listeners.unlisten(1, ANY, 3);
    walk(&mut listeners, 1, &[rows[0], rows[3]]);
    assert_eq!(listeners.snapshot().len(), 2);
    walk(&mut listeners, 1, &rows);
    assert_eq!(listeners.overflow, 6, "2, 3 and 5");
}

#[test]
fn what_is_remembered_of_groups_without_a_place_is_bounded() {
    let mut listeners = Listeners::new(true, 0, 1);
    let count = UNPLACED_MAX as u16 + 10;
    for _ in 0..2 {
        for port in 0..count {
            listeners.listen(1, ANY, port, &owner(1, b"a"));
        }
    }
    assert_eq!(listeners.unplaced.len(), UNPLACED_MAX);
    assert_eq!(listeners.overflow, u64::from(count) + 10);
    walk(&mut listeners, 2, &[]);
    assert!(listeners.unplaced.is_empty(), "their namespace is gone");
}

#[test]
fn process_names_in_the_inventory_are_printable() {
    let mut listeners = Listeners::new(true, 10, 1);
    let names = ["a\n\u{1b}", "b\u{202e}c", "d\u{200b}\u{ad}e", ""];
    for (name, port) in names.iter().zip(1..) {
        listeners.listen(1, ANY, port, &owner(7, name.as_bytes()));
    }
    let rows = listeners.snapshot();
    let shown: Vec<&str> = rows.iter().map(|row| row.process.as_str()).collect();
    let expected = [
        "a\u{fffd}\u{fffd}",
        "b\u{fffd}c",
        "d\u{fffd}\u{fffd}e",
        "unknown",
    ];
    assert_eq!(shown, expected);
}
