//! Text → value, one function for each type a setting can have. Errors name
//! the value and say what would be right; the caller adds where it stood.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use connmon_core::fold::{CrossFamilies, Network, PortRanges};
use connmon_http::duration;

/// A duration that must lie in `[least, most]`.
pub fn duration_within(text: &str, least: Duration, most: Duration) -> Result<Duration, String> {
    let value = duration(text)?;
    if value < least || value > most {
        return Err(format!(
            "bad duration {text:?}: must be between {} and {}",
            humantime::format_duration(least),
            humantime::format_duration(most)
        ));
    }
    Ok(value)
}

/// A whole number in `[least, most]`.
pub fn number(text: &str, least: u64, most: u64) -> Result<u64, String> {
    let bad = || format!("bad number {text:?}: must be a whole number from {least} to {most}");
    // `u64::from_str` takes a leading plus.
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let value: u64 = text.parse().map_err(|_| bad())?;
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(bad())
    }
}

/// A number of bytes: digits, or digits with `KiB`, `MiB` or `GiB`.
pub fn bytes(text: &str) -> Result<u64, String> {
    let (digits, scale) = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1u64 << 30)]
        .iter()
        .find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, *scale)))
        .unwrap_or((text, 1));
    let bad = || format!("bad size {text:?}: write bytes, or a number with KiB, MiB or GiB");
    number(digits, 0, u64::MAX)
        .map_err(|_| bad())?
        .checked_mul(scale)
        .ok_or_else(bad)
}

/// Largest event ring, bytes.
const RING_BYTES_MOST: u64 = 1 << 30;

/// `--ebpf.ring-buffer-size`, rounded up to `page × 2^n` as
/// `ringbuf_map_alloc` (kernel/bpf/ringbuf.c) demands.
pub fn ring_bytes(text: &str, page: u64) -> Result<u32, String> {
    let wanted = bytes(text)?;
    if wanted == 0 || wanted > RING_BYTES_MOST {
        return Err(format!(
            "bad ring buffer size {text:?}: must be between 1 and {RING_BYTES_MOST} bytes"
        ));
    }
    let pages = wanted.div_ceil(page).next_power_of_two();
    u32::try_from(pages * page).map_err(|_| format!("bad ring buffer size {text:?}: too large"))
}

/// `true` or `false`, also as 1/0, on/off, yes/no.
pub fn switch(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "on" | "yes" => Ok(true),
        "false" | "0" | "off" | "no" => Ok(false),
        _ => Err(format!("bad value {text:?}: must be true or false")),
    }
}

/// One of a closed set of words, in capitals or not, as Prometheus takes the
/// levels of its log.
pub fn choice<T: Copy>(text: &str, choices: &[(&str, T)]) -> Result<T, String> {
    choices
        .iter()
        .find(|(word, _)| word.eq_ignore_ascii_case(text))
        .map(|(_, value)| *value)
        .ok_or_else(|| {
            let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
            format!("bad value {text:?}: must be one of {}", words.join(", "))
        })
}

/// A CIDR block; host bits are cleared, v4-mapped blocks become IPv4 ones.
pub fn network(text: &str) -> Result<Network, String> {
    let bad = |why: &str| format!("bad network {text:?}: {why}");
    let Some((address, prefix)) = text.split_once('/') else {
        return Err(match text.parse::<IpAddr>() {
            Ok(IpAddr::V4(_)) => bad(&format!("a prefix length is missing; write {text}/32")),
            Ok(IpAddr::V6(_)) => bad(&format!("a prefix length is missing; write {text}/128")),
            Err(_) => bad("write it like 10.0.0.0/8 or 2001:db8::/32"),
        });
    };
    let address: IpAddr = address
        .parse()
        .map_err(|_| bad("the part before / is no IP address"))?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let prefix = number(prefix, 0, most)
        .map_err(|_| bad(&format!("the prefix length must be from 0 to {most}")))?
        as u8;
    match address {
        IpAddr::V4(v4) => Ok(v4_network(v4.to_bits(), prefix)),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) if prefix >= 96 => Ok(v4_network(v4.to_bits(), prefix - 96)),
            Some(_) => Err(bad(
                "a v4-mapped network needs a prefix length of at least 96",
            )),
            None => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                Ok(Network {
                    address: Ipv6Addr::from_bits(v6.to_bits() & mask).into(),
                    prefix,
                })
            }
        },
    }
}

fn v4_network(bits: u32, prefix: u8) -> Network {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    Network {
        address: std::net::Ipv4Addr::from_bits(bits & mask).into(),
        prefix,
    }
}

/// `22,80,8000-8100`: sorted inclusive ranges, overlapping and adjacent ones
/// joined.
pub fn port_list(text: &str) -> Result<Vec<(u16, u16)>, String> {
    let mut ranges = Vec::new();
    for item in text.split(',') {
        let item = item.trim();
        let bad = |why: &str| format!("bad port {item:?} in {text:?}: {why}");
        let port = |digits: &str| {
            number(digits, 1, 65_535)
                .map(|port| port as u16)
                .map_err(|_| bad("must be a port from 1 to 65535 or a range like 8000-8100"))
        };
        let (first, last) = match item.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(item)?, port(item)?),
        };
        if first > last {
            return Err(bad("the range ends before it starts"));
        }
        ranges.push((first, last));
    }
    ranges.sort_unstable();
    let mut joined: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match joined.last_mut() {
            Some((_, end)) if u32::from(first) <= u32::from(*end) + 1 => *end = (*end).max(last),
            _ => joined.push((first, last)),
        }
    }
    Ok(joined)
}

/// `--ports.allow`.
pub fn ports_allow(text: &str) -> Result<PortRanges, String> {
    match text.to_ascii_lowercase().as_str() {
        "all" => Ok(None),
        list => port_list(list).map(Some),
    }
}

/// `--metrics.country-port`.
pub fn cross_families(text: &str) -> Result<CrossFamilies, String> {
    match text.to_ascii_lowercase().as_str() {
        "off" => Ok(CrossFamilies::Off),
        "all" => Ok(CrossFamilies::All),
        list => port_list(list).map(CrossFamilies::Ports),
    }
}

/// Paths the server keeps for itself.
const RESERVED_PATHS: [&str; 3] = ["/-/healthy", "/-/ready", "/api/v1/summary"];

/// What the paths of the page's files start with.
const RESERVED_PREFIX: &str = "/assets/";

/// `--web.telemetry-path`: `/` and URL path characters, none of the server's
/// own paths. `/` itself is allowed: the metrics then take the page's place.
pub fn telemetry_path(text: &str) -> Result<String, String> {
    let bad = |why: &str| format!("bad path {text:?}: {why}");
    if !text.starts_with('/') {
        return Err(bad("must start with /"));
    }
    // RFC 3986 `pchar` and `/`, without percent-encoding.
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(&b);
    if !text.bytes().all(allowed) {
        return Err(bad("must be made of URL path characters, without ? # %"));
    }
    if RESERVED_PATHS.contains(&text) || text.starts_with(RESERVED_PREFIX) || text.starts_with("//")
    {
        return Err(bad("the server uses that path itself; choose another"));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_round_up_to_a_power_of_two_of_pages() {
        assert_eq!(ring_bytes("8388608", 4096), Ok(8_388_608));
        assert_eq!(ring_bytes("8388609", 4096), Ok(16_777_216));
        assert_eq!(ring_bytes("3MiB", 4096), Ok(4_194_304));
        assert_eq!(ring_bytes("5000", 4096), Ok(8_192));
        assert_eq!(ring_bytes("4096", 65_536), Ok(65_536));
        assert_eq!(ring_bytes("1", 4096), Ok(4_096));
        assert_eq!(ring_bytes("4095", 4096), Ok(4_096));
        for text in [
            "0",
            "-1",
            "8MB",
            "8 MiB",
            "2GiB",
            "99999999999999999999GiB",
            "",
        ] {
            assert!(ring_bytes(text, 4096).is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn every_parser_is_total(any in ".*", near in "[0-9a-f.:/\\[\\],\\-smhdKMGiB]{0,24}") {
            for text in [&any, &near] {
                let _ = (duration(text), bytes(text), ring_bytes(text, 4096), network(text));
                let _ = (port_list(text), telemetry_path(text), switch(text));
                let _ = connmon_http::address::parse(text);
            }
        }

        #[test]
        fn networks_hold_their_address_and_no_host_bits(bits: u128, prefix in 0_u8..=128) {
            let text = format!("{}/{prefix}", Ipv6Addr::from_bits(bits));
            if let Ok(Network { address: IpAddr::V6(address), prefix: parsed }) = network(&text) {
                let host_bits = u128::MAX.checked_shr(prefix.into()).unwrap_or(0);
                proptest::prop_assert_eq!(parsed, prefix);
                proptest::prop_assert_eq!(address.to_bits(), bits & !host_bits);
            }
        }

    }

    #[test]
    fn networks_of_one_meaning_are_one_value() {
        let ten = network("10.0.0.0/8").unwrap();
        assert_eq!(network("10.1.2.3/8").unwrap(), ten);
        assert_eq!(network("::ffff:10.0.0.0/104").unwrap(), ten);
        assert_eq!(network("::ffff:0a00:1/104").unwrap(), ten);
        assert_eq!(network("0.0.0.0/0").unwrap().prefix, 0);
        assert_eq!(
            network("2001:db8:ffff::1/32").unwrap(),
            network("2001:db8::/32").unwrap()
        );
        assert_eq!(network("::/0").unwrap().address, Ipv6Addr::UNSPECIFIED);
        for text in [
            "10.0.0.0",
            "::1",
            "10.0.0.0/33",
            "::1/129",
            "10.0.0/8",
            "banana",
            "banana/8",
            "/8",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "10.0.0.0/8/8",
            "::ffff:10.0.0.0/8",
            "fe80::1%eth0/64",
            "",
        ] {
            assert!(network(text).is_err(), "{text}");
        }
        assert!(network("10.0.0.1").unwrap_err().contains("10.0.0.1/32"));
    }

    #[test]
    fn choices_are_taken_in_capitals_too() {
        let levels = [("info", 1), ("warn", 2)];
        for (text, value) in [("info", Ok(1)), ("WARN", Ok(2)), ("Info", Ok(1))] {
            assert_eq!(choice(text, &levels), value, "{text}");
        }
        assert_eq!(
            choice("loud", &levels).unwrap_err(),
            "bad value \"loud\": must be one of info, warn"
        );
        assert_eq!(ports_allow("ALL"), Ok(None));
        assert_eq!(cross_families("Off"), Ok(CrossFamilies::Off));
    }

    #[test]
    fn port_lists_are_sorted_and_joined() {
        assert_eq!(
            port_list("8000-8100,22, 443,80,8050-8200,81"),
            Ok(vec![(22, 22), (80, 81), (443, 443), (8000, 8200)])
        );
        assert_eq!(port_list("1-65535"), Ok(vec![(1, 65_535)]));
        for text in [
            "", "0", "65536", "80,", "100-50", "a", "-", "80-", "http", "+80",
        ] {
            assert!(port_list(text).is_err(), "{text}");
        }
        assert_eq!(ports_allow("all"), Ok(None));
        assert_eq!(cross_families("off"), Ok(CrossFamilies::Off));
        assert!(cross_families("on").is_err());
    }

    #[test]
    fn telemetry_paths_stay_out_of_the_servers_way() {
        assert!(telemetry_path("/metrics").is_ok());
        assert!(telemetry_path("/").is_ok());
        for text in [
            "metrics",
            "",
            "/a b",
            "/m?x",
            "/-/ready",
            "//m",
            "/é",
            "/a%20",
            "/api/v1/summary",
            "/assets/app.js",
            "/assets/",
        ] {
            assert!(telemetry_path(text).is_err(), "{text}");
        }
    }
}
