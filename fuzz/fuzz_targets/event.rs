//! A record of the ring buffer: an event or a refusal.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = connmon::event::decode(data);
});
