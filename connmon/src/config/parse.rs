//! Text → value, one function for each type that a setting can have. Errors
//! name the value and what would be right; the caller adds where it stands.

use std::net::IpAddr;
use std::time::Duration;

use connmon_core::fold::{CrossFamilies, Network, PortRanges};
use connmon_host::kernel::AttachChoice;
use connmon_host::sandbox::SandboxChoice;
use connmon_http::address::{self, ListenAddress};
use connmon_http::duration;
use ipnet::IpNet;
use log::LevelFilter;

use super::{LogFormat, SourceChoice};

/// Shortest interval: below it the agent would do little else.
pub const SHORTEST: Duration = Duration::from_millis(100);
/// Longest interval of polling.
pub const HOUR: Duration = Duration::from_secs(3_600);
/// Longest interval of other readings.
pub const DAY: Duration = Duration::from_secs(86_400);

/// The words of each setting that takes one of a few.
pub const BOOLEANS: &[(&str, bool)] = &[
    ("on", true),
    ("off", false),
    ("true", true),
    ("false", false),
    ("yes", true),
    ("no", false),
    ("1", true),
    ("0", false),
];
/// `--source`.
pub const SOURCES: &[(&str, SourceChoice)] = &[
    ("auto", SourceChoice::Auto),
    ("ebpf", SourceChoice::Ebpf),
    ("proc", SourceChoice::Proc),
];
/// `--ebpf.attach`.
pub const ATTACH: &[(&str, AttachChoice)] = &[
    ("auto", AttachChoice::Auto),
    ("fentry", AttachChoice::Fentry),
    ("kprobe", AttachChoice::Kprobe),
    ("tracepoint", AttachChoice::Tracepoint),
];
/// `--sandbox`.
pub const SANDBOX: &[(&str, SandboxChoice)] = &[
    ("auto", SandboxChoice::Auto),
    ("strict", SandboxChoice::Strict),
    ("off", SandboxChoice::Off),
];
/// `--log.level`.
pub const LOG_LEVELS: &[(&str, LevelFilter)] = &[
    ("error", LevelFilter::Error),
    ("warn", LevelFilter::Warn),
    ("info", LevelFilter::Info),
    ("debug", LevelFilter::Debug),
    ("trace", LevelFilter::Trace),
];
/// `--log.format`.
pub const LOG_FORMATS: &[(&str, LogFormat)] =
    &[("logfmt", LogFormat::Logfmt), ("json", LogFormat::Json)];

/// One of a few words, in capitals or not, as Prometheus takes the levels of
/// its log.
pub fn choice<T: Copy>(
    choices: &'static [(&'static str, T)],
) -> impl Fn(&str) -> Result<T, String> + Clone {
    |text| {
        let chosen = choices
            .iter()
            .find(|(word, _)| word.eq_ignore_ascii_case(text));
        chosen.map(|(_, value)| *value).ok_or_else(|| {
            let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
            format!("bad value {text:?}: must be one of {}", words.join(", "))
        })
    }
}

/// A duration in `[least, most]`.
pub fn between(
    least: Duration,
    most: Duration,
) -> impl Fn(&str) -> Result<Duration, String> + Clone {
    move |text| {
        let value = duration(text)?;
        if (least..=most).contains(&value) {
            return Ok(value);
        }
        let [least, most] = [least, most].map(humantime::format_duration);
        Err(format!(
            "bad duration {text:?}: must be between {least} and {most}"
        ))
    }
}

/// `--traffic.interval`: `None` for 0.
pub fn traffic_interval(text: &str) -> Result<Option<Duration>, String> {
    if duration(text)?.is_zero() {
        return Ok(None);
    }
    let interval = between(SHORTEST, DAY)(text);
    interval
        .map(Some)
        .map_err(|problem| format!("{problem}, or 0 to switch sampling off"))
}

/// A whole number in `[least, most]`.
fn number(text: &str, least: u64, most: u64) -> Result<u64, String> {
    // `u64::from_str` takes a leading plus.
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let value = text
        .parse()
        .ok()
        .filter(|value| digits && (least..=most).contains(value));
    value.ok_or_else(|| {
        format!("bad number {text:?}: must be a whole number from {least} to {most}")
    })
}

/// A number of things, in `[least, most]`.
pub fn count(least: u64, most: u64) -> impl Fn(&str) -> Result<usize, String> + Clone {
    move |text| number(text, least, most).map(|count| count as usize)
}

/// `--listeners.max`.
pub fn listeners_max(text: &str) -> Result<usize, String> {
    count(1, 65_536)(text)
        .map_err(|problem| format!("{problem}; --listeners off switches the inventory off"))
}

/// `--web.listen-address`; the caller fills in where it was written.
pub fn listen_address(text: &str) -> Result<ListenAddress, String> {
    let (host, port) = address::parse(text)?;
    Ok(ListenAddress {
        text: text.to_owned(),
        origin: "--web.listen-address (default)".to_owned(),
        host,
        port,
    })
}

/// A number of bytes: digits, or digits with `KiB`, `MiB` or `GiB`.
fn bytes(text: &str) -> Result<u64, String> {
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

/// A CIDR block; host bits are cleared, v4-mapped blocks become IPv4 ones.
pub fn network(text: &str) -> Result<Network, String> {
    let bad = |why: &str| format!("bad network {text:?}: {why}");
    let network: IpNet = text.parse().map_err(|_| match text.parse::<IpAddr>() {
        Ok(address) => bad(&format!(
            "a prefix length is missing; write {}",
            IpNet::from(address)
        )),
        Err(_) => bad("must be an address and a prefix length, like 10.0.0.0/8 or 2001:db8::/32"),
    })?;
    let network = match network {
        IpNet::V6(v6) => match v6.addr().to_ipv4_mapped() {
            Some(v4) => {
                let prefix = v6.prefix_len().checked_sub(96);
                let prefix = prefix.ok_or_else(|| {
                    bad("an IPv4-mapped network needs a prefix length of at least 96")
                })?;
                IpNet::new_assert(v4.into(), prefix)
            }
            None => network,
        },
        IpNet::V4(_) => network,
    };
    Ok(Network {
        address: network.network(),
        prefix: network.prefix_len(),
    })
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
    match text.eq_ignore_ascii_case("all") {
        true => Ok(None),
        false => port_list(text).map(Some),
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

/// Paths that the server answers itself. One that ends with `/`
/// covers all that begin with it.
const RESERVED_PATHS: [&str; 5] = [
    "/-/healthy",
    "/-/ready",
    "/api/v1/summary",
    "/assets/",
    "//",
];

/// `--web.telemetry-path`: `/` and URL path characters, none of the server's
/// own paths. `/` itself is allowed: the metrics then take the page's place.
pub fn telemetry_path(text: &str) -> Result<String, String> {
    let bad = |why: &str| Err(format!("bad path {text:?}: {why}"));
    // RFC 3986 `pchar` and `/`, without percent-encoding.
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(&b);
    let is_reserved = |path: &&str| match path.ends_with('/') {
        true => text.starts_with(path),
        false => text == *path,
    };
    if !text.starts_with('/') {
        return bad("must start with /");
    }
    if !text.bytes().all(allowed) {
        return bad("must be made of URL path characters, without ? # %");
    }
    if RESERVED_PATHS.iter().any(is_reserved) {
        return bad("the server uses that path itself; choose another");
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

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
                let _ = (port_list(text), telemetry_path(text), traffic_interval(text));
                let _ = listen_address(text);
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
        let level = choice(&[("info", 1), ("warn", 2)]);
        for (text, value) in [("info", Ok(1)), ("WARN", Ok(2)), ("Info", Ok(1))] {
            assert_eq!(level(text), value, "{text}");
        }
        assert_eq!(
            level("loud").unwrap_err(),
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
