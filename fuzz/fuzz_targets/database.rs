//! A country database: refused, or every address has an answer.
#![no_main]

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use connmon_core::geo::{Database, Locate, Locator};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // The last 16 bytes are an address to look up as well.
    let Some((data, last)) = data.split_last_chunk::<16>() else {
        return;
    };
    let Ok(database) = Database::from_bytes(data.to_vec(), || true) else {
        return;
    };
    let mut locator = Locator::new(Arc::new(database));
    let last = Ipv6Addr::from(*last);
    let [.., a, b, c, d] = last.octets();
    for address in [
        IpAddr::V6(last),
        IpAddr::from([a, b, c, d]),
        IpAddr::from([0, 0, 0, 0]),
        IpAddr::from([255, 255, 255, 255]),
        IpAddr::V6(Ipv6Addr::from(u128::MAX)),
    ] {
        let _ = locator.country(address);
    }
});
