use super::*;

fn key(b: u32) -> Key {
    Key { a: 1, b, netns: 1 }
}

fn table(capacity: usize) -> Table {
    Table::new(capacity, Hasher::new(&[3; 16]))
}

#[test]
fn slots_come_back_and_indexes_follow() {
    let mut table = table(3000);
    let mut slots = Vec::new();
    for n in 0..3000u32 {
        let slot = table.allocate().unwrap();
        table.bind_id(slot, u64::from(n) + 1);
        table.bind_key(slot, key(n));
        slots.push(slot);
    }
    assert!(table.is_full() && table.allocate().is_none());
    for (n, &slot) in (0u32..).zip(&slots) {
        assert_eq!(table.find_id(u64::from(n) + 1), Some(slot));
        assert_eq!(table.find_row(&key(n), 0, 0, 1, true), Some((slot, true)));
    }
    for &slot in &slots {
        table.remove(slot);
    }
    assert_eq!(table.find_id(1), None);
    assert_eq!(table.find_row(&key(0), 0, 0, 1, true), None);
    assert!(table.allocate().is_some());
}

#[test]
fn the_same_cookie_beats_no_cookie_and_another_cookie_is_another_socket() {
    let mut table = table(10);
    let [none, seven] = [0, 7].map(|cookie| {
        let slot = table.allocate().unwrap();
        table.entry_mut(slot).cookie = cookie;
        table.bind_key(slot, key(5));
        slot
    });
    assert_eq!(table.find_row(&key(5), 0, 7, 1, true), Some((seven, false)));
    assert_eq!(table.find_row(&key(5), 0, 8, 1, true), Some((none, false)));
    table.bind_id(none, 99);
    assert_eq!(table.find_adoptable(&key(5), 8, ESTABLISHED), None);
    assert_eq!(table.find_adoptable(&key(5), 0, ESTABLISHED), Some(seven));
    table.rebind_id(none, 98);
    assert_eq!((table.find_id(99), table.find_id(98)), (None, Some(none)));
}

#[test]
fn a_later_open_makes_suspects_and_rows_go_to_it_first() {
    let mut table = table(10);
    let stale = table.allocate().unwrap();
    table.bind_id(stale, 1);
    table.bind_key(stale, key(5));
    table.suspect_twins(&key(5));
    let newer = table.allocate().unwrap();
    table.bind_id(newer, 2);
    table.bind_key(newer, key(5));
    assert_eq!(table.find_row(&key(5), 0, 7, 1, true), Some((newer, false)));
    table.remove(newer);
    assert_eq!(table.find_row(&key(5), 0, 7, 1, true), Some((stale, true)));
}

#[test]
fn baselines_wrap_and_resets_count_nothing() {
    let mut entry = Entry::FREE;
    assert_eq!(
        entry.advance_received((1 << 48) - 10),
        0,
        "more than half way round is back"
    );
    assert_eq!(entry.advance_received((1 << 48) + 5), 15);
    assert_eq!(entry.advance_received(1000), 995);
    assert_eq!(entry.advance_received(10), 0);
    assert_eq!(entry.advance_received(30), 20);
    assert_eq!(entry.advance_sent(7), 7);
    assert_eq!(entry.advance_retransmitted(u32::MAX), 0);
    assert_eq!(entry.advance_retransmitted(4), 5);
    assert_eq!(entry.advance_retransmitted(3), 0);
}

#[test]
fn state_and_direction_share_a_byte() {
    let mut entry = Entry::FREE;
    for direction in Direction::ALL {
        for state in 1..=12 {
            entry.set_direction(direction);
            entry.set_state(state);
            assert_eq!((entry.direction(), entry.state()), (direction, state));
        }
    }
}

#[test]
fn a_million_connections_cost_at_most_ninety_bytes_each() {
    let mut table = table(1 << 20);
    for n in 0..1_000_000u32 {
        let slot = table.allocate().unwrap();
        table.bind_id(slot, u64::from(n) * 2048 + 0xffff_8880_0000_0000);
        table.bind_key(slot, key(n));
    }
    let each = table.heap_bytes() as f64 / 1e6;
    println!("{each:.1} bytes per connection at 1,000,000");
    assert!(each <= 90.0, "{each}");
}
