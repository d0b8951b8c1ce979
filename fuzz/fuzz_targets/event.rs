//! A record of the ring buffer: an event or a refusal; and a series of sockets.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = connmon::event::decode(data);
    let mut series = data;
    while let Ok(Some((_, length))) = connmon::event::decode_live(series) {
        series = &series[length..];
    }
});
