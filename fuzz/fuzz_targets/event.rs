//! A record of the ring buffer or of a scan: it is decoded or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = connmon_core::event::decode(data);
    let _ = connmon_core::event::decode_live(data);
});
