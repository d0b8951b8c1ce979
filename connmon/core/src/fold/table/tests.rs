use super::*;

fn key(b: u32) -> Key {
    Key { a: 1, b, netns: 1 }
}

fn table(capacity: usize) -> Table {
    Table::new(capacity, Hasher::new(&[3; 16]))
}

#[test]
fn removed_slots_are_reused_and_leave_both_indexes() {
    let mut table = table(3000);
    let mut slots = Vec::new();
    for n in 0..3000u32 {
        slots.push(table.insert(u64::from(n) + 1, key(n)).unwrap());
    }
    assert!(table.insert(0, key(0)).is_none());
    for (n, &slot) in (0u32..).zip(&slots) {
        assert_eq!(table.find_id(u64::from(n) + 1), Some(slot));
        assert_eq!(
            table.find_row(&key(n), 0, 0, 1, true, false),
            Some((slot, true))
        );
    }
    for &slot in &slots {
        table.remove(slot);
    }
    assert_eq!(table.find_id(1), None);
    assert_eq!(table.find_row(&key(0), 0, 0, 1, true, false), None);
    assert!(table.insert(0, key(0)).is_some());
}

#[test]
fn a_row_prefers_its_cookie_and_takes_no_other() {
    let mut table = table(10);
    let [none, seven] = [0, 7].map(|cookie| {
        let slot = table.insert(0, key(5)).unwrap();
        table.entry_mut(slot).identity = cookie;
        slot
    });
    assert_eq!(
        table.find_row(&key(5), 0, 7, 1, true, false),
        Some((seven, false))
    );
    assert_eq!(
        table.find_row(&key(5), 0, 8, 1, true, false),
        Some((none, false))
    );
    table.bind_id(none, 99);
    assert_eq!(table.find_unnamed(&key(5), 8, ESTABLISHED), None);
    assert_eq!(table.find_unnamed(&key(5), 0, ESTABLISHED), Some(seven));
    table.rebind_id(none, 98);
    assert_eq!((table.find_id(99), table.find_id(98)), (None, Some(none)));
}

#[test]
fn rows_match_a_later_open_before_a_reopened_entry() {
    let mut table = table(10);
    let stale = table.insert(1, key(5)).unwrap();
    table.mark_reopened(&key(5));
    let newer = table.insert(2, key(5)).unwrap();
    assert_eq!(
        table.find_row(&key(5), 0, 7, 1, true, false),
        Some((newer, false))
    );
    table.remove(newer);
    assert_eq!(
        table.find_row(&key(5), 0, 7, 1, true, false),
        Some((stale, true))
    );
}

#[test]
fn a_million_connections_cost_at_most_ninety_bytes_each() {
    let mut table = table(1 << 20);
    for n in 0..1_000_000u32 {
        let id = u64::from(n) * 2048 + 0xffff_8880_0000_0000;
        table.insert(id, key(n)).unwrap();
    }
    let each = table.heap_bytes() as f64 / 1e6;
    println!("{each:.1} bytes per connection at 1,000,000");
    assert!(each <= 90.0, "{each}");
}
