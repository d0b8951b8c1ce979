//! A whole `/proc/<pid>/net/tcp{,6}`: every line is a row, left out or
//! counted, whatever the bytes.
#![no_main]

use connmon_host::reconcile::Parsed;
use connmon_host::reconcile::procfs::{parse_line, read_table};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (mut rows, mut undecodable) = (0_u64, 0);
    read_table(data, &mut undecodable, |row| {
        assert!((1..=5).contains(&row.state) || (8..=11).contains(&row.state));
        rows += 1;
        true
    })
    .expect("a slice can always be read");
    let lines = data.split_inclusive(|&byte| byte == b'\n').count() as u64;
    assert!(rows + undecodable <= lines);
    // Reading by buffers sees the lines that splitting sees.
    if lines > 0 && data.iter().all(|&byte| byte != b'\n') && data.len() < 4096 {
        assert_eq!((rows, undecodable), (0, 1), "a line without an end");
    }
    if let Parsed::Row(row) = parse_line(data) {
        assert_eq!(row.tuple.local, row.tuple.local.to_canonical());
    }
});
