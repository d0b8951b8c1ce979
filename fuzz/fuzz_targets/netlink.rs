//! A datagram of sock_diag answers, after four bytes that are ignored: the
//! recordings in `connmon/fixtures/diag` have their length there, so they are
//! seeds as they are. The request being answered is the one that the first
//! message names, so that rows are reached; another one is tried as well.
#![no_main]

use connmon_host::reconcile::diag::{Datagram, parse_datagram, parse_message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((_, datagram)) = data.split_first_chunk::<4>() else {
        return;
    };
    let sequence = match datagram.get(8..12) {
        Some(bytes) => u32::from_ne_bytes(bytes.try_into().expect("four bytes")),
        None => 0,
    };
    let (outcome, rows) = parse(datagram, sequence);
    // A header and an inet_diag_msg each.
    assert!(rows <= datagram.len() / 88);
    assert!(outcome.undecodable <= datagram.len() as u64 / 16 + 1);
    assert!(outcome.error.is_none_or(|errno| errno > 0));
    let (_, others) = parse(datagram, !sequence);
    assert!(rows + others <= datagram.len() / 88);
    let _ = parse_message(datagram);
});

fn parse(datagram: &[u8], sequence: u32) -> (Datagram, usize) {
    let mut rows = 0;
    let outcome = parse_datagram(datagram, sequence, &mut |row| {
        assert!((1..=5).contains(&row.state) || (8..=11).contains(&row.state));
        rows += 1;
        true
    });
    (outcome, rows)
}
