//! Country databases: good, bad and changing ones.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use connmon::database::{self, MAX_DATABASE_BYTES, Outcome, Reloader};
use connmon_core::geo::{Country, Database, Locate, Locator};
use mmdb_writer::{Value, Writer};

/// A directory that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("connmon-geo-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn flat(code: &str) -> Value {
    Value::map([("country_code", Value::from(code))])
}

fn database(records: &[(&str, Value)]) -> Vec<u8> {
    let mut writer = Writer::new("connmon-test");
    for (network, value) in records {
        let network: ipnet::IpNet = network.parse().unwrap();
        writer.insert_value(network, value.clone()).unwrap();
    }
    writer.to_bytes().unwrap()
}

fn locator(bytes: Vec<u8>) -> Locator {
    Locator::new(Arc::new(Database::from_bytes(bytes, || true).unwrap()))
}

fn code(locator: &mut Locator, address: &str) -> &'static str {
    locator.country(address.parse::<IpAddr>().unwrap()).code()
}

#[test]
fn the_embedded_database_is_sound() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/dbip-country-lite.mmdb");
    let checked = database::open(&path).unwrap();
    let embedded = Database::embedded().unwrap();
    assert_eq!(embedded.database_type(), "DBIP-Country-Lite");
    assert_eq!(embedded.build_timestamp(), checked.build_timestamp());
    assert!(embedded.build_timestamp() > 1_600_000_000);
    let mut locator = Locator::new(Arc::new(embedded));
    for (address, country) in [
        ("8.8.8.8", "US"),
        ("193.0.6.139", "NL"),
        ("2001:67c:2e8:22::c100:68b", "NL"),
    ] {
        assert_eq!(code(&mut locator, address), country, "{address}");
        // The cached answer is the same one.
        assert_eq!(code(&mut locator, address), country, "{address}");
    }
}

#[test]
fn special_ranges_come_before_wider_records() {
    let mut locator = locator(database(&[
        ("::/1", flat("FR")),
        ("8000::/1", flat("FR")),
        ("0.0.0.0/0", flat("US")),
    ]));
    for (address, country) in [
        ("10.1.2.3", "private"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.1.1", "private"),
        ("169.254.1.1", "private"),
        ("100.64.0.1", "private"),
        ("100.127.255.255", "private"),
        ("fc00::1", "private"),
        ("fdff::1", "private"),
        ("fe80::1", "private"),
        ("febf::1", "private"),
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("::1", "loopback"),
        ("::ffff:10.0.0.1", "private"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:1.1.1.1", "US"),
        ("64:ff9b::1.1.1.1", "US"),
        ("64:ff9b::10.1.1.1", "private"),
        ("100.63.255.255", "US"),
        ("100.128.0.0", "US"),
        ("172.32.0.0", "US"),
        ("192.169.0.0", "US"),
        ("fec0::1", "FR"),
        ("64:ff9b:1::1.1.1.1", "FR"),
        ("2001:db8::1", "FR"),
    ] {
        assert_eq!(code(&mut locator, address), country, "{address}");
    }
}

#[test]
fn every_known_record_layout_is_understood() {
    let nested = |field: &'static str, code: &'static str| {
        Value::map([(field, Value::map([("iso_code", Value::from(code))]))])
    };
    let mut locator = locator(database(&[
        ("198.18.0.0/24", flat("DE")),
        ("198.18.1.0/24", nested("country", "SE")),
        ("198.18.2.0/24", nested("registered_country", "SE")),
        (
            "198.18.3.0/24",
            Value::map([("country", Value::from("JP"))]),
        ),
        (
            "198.18.4.0/24",
            Value::map([
                ("country", Value::from("Japan")),
                ("country_code", Value::from("JP")),
            ]),
        ),
        ("198.18.5.0/24", flat("ZZ")),
        ("198.18.6.0/24", flat("EU")),
        ("198.18.7.0/24", flat("<script>")),
        (
            "198.18.8.0/24",
            Value::map([("country_code", Value::from(7_u32))]),
        ),
        ("198.18.9.0/24", Value::from("DE")),
        ("198.18.10.0/24", flat("XK")),
        ("10.7.0.0/16", flat("SE")),
        ("10.8.0.0/16", flat("ZZ")),
        ("198.18.11.0/24", flat("dk")),
    ]));
    for (address, country) in [
        ("198.18.0.1", "DE"),
        ("198.18.1.1", "SE"),
        ("198.18.2.1", "unknown"),
        ("198.18.3.1", "JP"),
        ("198.18.4.1", "JP"),
        ("198.18.5.1", "unknown"),
        ("198.18.6.1", "unknown"),
        ("198.18.7.1", "unknown"),
        ("198.18.8.1", "unknown"),
        ("198.18.9.1", "unknown"),
        ("198.18.10.1", "XK"),
        ("10.7.1.1", "SE"),
        ("10.8.1.1", "private"),
        ("10.9.1.1", "private"),
        ("198.18.11.1", "DK"),
        ("198.18.12.1", "unknown"),
        ("2001:db8::1", "unknown"),
    ] {
        assert_eq!(code(&mut locator, address), country, "{address}");
    }
}

#[test]
fn the_cache_never_answers_for_another_record() {
    // More records than cache slots, asked for twice in two orders.
    let mut records = Vec::new();
    for index in 0..10_000_u32 {
        let country = Country::from_index(index as usize % (Country::COUNT - 3)).unwrap();
        let value = Value::map([
            ("country_code", Value::from(country.code())),
            ("serial", Value::from(index)),
        ]);
        let network = format!("{}/32", std::net::Ipv4Addr::from_bits(0xc612_0000 + index));
        records.push((network, value, country));
    }
    let inserted: Vec<_> = records
        .iter()
        .map(|(n, v, _)| (n.as_str(), v.clone()))
        .collect();
    let mut locator = locator(database(&inserted));
    for (network, _, country) in records.iter().chain(records.iter().rev()) {
        let address: IpAddr = network.trim_end_matches("/32").parse().unwrap();
        assert_eq!(locator.country(address), *country, "{network}");
    }
}

#[test]
fn files_that_are_no_country_database_are_refused() {
    let scratch = Scratch::new("bad");
    let good = database(&[("198.18.0.0/15", flat("DE"))]);
    let asn = database(&[(
        "198.18.0.0/15",
        Value::map([("autonomous_system_number", Value::from(64_512_u32))]),
    )]);
    for (name, bytes, message) in [
        ("empty", Vec::new(), "the file is empty"),
        ("text", b"hello, world\n".to_vec(), "no valid MMDB file"),
        ("asn", asn, "names no country"),
        ("cut", good[..good.len() / 2].to_vec(), "no valid MMDB file"),
        (
            "gzip",
            b"\x1f\x8b\x08\x00".repeat(100),
            "no valid MMDB file",
        ),
    ] {
        let path = scratch.path(name);
        std::fs::write(&path, bytes).unwrap();
        let error = database::open(&path).unwrap_err().to_string();
        assert!(error.contains(message) && error.contains(name), "{error}");
    }
    for path in [
        scratch.path("missing"),
        scratch.0.clone(),
        "/dev/zero".into(),
    ] {
        let error = database::open(&path).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
}

/// Truncated at every length, and with every byte changed: an error or a
/// database that answers, never a panic or an endless loop.
#[test]
fn mangled_databases_neither_panic_nor_hang() {
    let good = database(&[
        ("198.18.0.0/16", flat("DE")),
        ("198.19.0.0/16", flat("FR")),
        (
            "2001:db8::/32",
            Value::map([("country", Value::map([("iso_code", Value::from("SE"))]))]),
        ),
    ]);
    let ask = |bytes: Vec<u8>| {
        if let Ok(database) = Database::from_bytes(bytes, || true) {
            let mut locator = Locator::new(Arc::new(database));
            for address in [
                "198.18.0.1",
                "198.19.0.1",
                "2001:db8::1",
                "9.9.9.9",
                "2a00::1",
            ] {
                let _ = code(&mut locator, address);
            }
        }
    };
    for length in 0..good.len() {
        ask(good[..length].to_vec());
    }
    for at in 0..good.len() {
        for change in [0x01, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= change;
            ask(bytes);
        }
    }
}

/// Every record of the tree points back at its root.
/// `agent/files.rs two_largest_databases_are_in_memory_and_no_more` shows that
/// there are no more than two.
#[test]
fn two_largest_databases_fit_the_shipped_limit() {
    let manifest = include_str!("../../deploy/kubernetes/base/daemonset.yaml");
    let limits = manifest.split("limits:").nth(1).unwrap();
    let memory = limits.split("memory: ").nth(1).unwrap();
    let mib: u64 = memory.split("Mi").next().unwrap().parse().unwrap();
    // One in use, one under check with a bit for each of its bytes.
    let databases = 2 * MAX_DATABASE_BYTES + MAX_DATABASE_BYTES / 8;
    // A full table by the comment there, and the ring buffer.
    let rest = 100_000_000 + (8 << 20);
    assert!(databases + rest < mib << 20, "{databases} and {rest} bytes");
}

#[test]
fn a_cyclic_search_tree_is_refused() {
    let mut bytes = database(&[("198.18.0.0/15", flat("DE"))]);
    let end = bytes.windows(16).position(|w| w == [0; 16]).unwrap();
    // Leave the separator; node 0 and its left spine are enough.
    let start = std::time::Instant::now();
    for byte in &mut bytes[..end] {
        *byte = 0;
    }
    assert!(Database::from_bytes(bytes, || true).is_err());
    assert!(start.elapsed() < std::time::Duration::from_secs(5));
}

fn expect_replaced(outcome: Option<Outcome>) -> Database {
    match outcome {
        Some(Outcome::Replaced(database)) => database,
        other => panic!("not replaced: {other:?}"),
    }
}

fn country_of(database: Database) -> &'static str {
    code(&mut Locator::new(Arc::new(database)), "198.18.0.1")
}

fn write(path: &Path, country: &str) {
    std::fs::write(path, database(&[("198.18.0.0/15", flat(country))])).unwrap();
}

#[test]
fn every_kind_of_change_is_seen_and_bad_files_keep_the_old() {
    let scratch = Scratch::new("reload");
    let path = scratch.path("country.mmdb");
    write(&path, "DE");
    let (mut reloader, first) = Reloader::open(&path).unwrap();
    assert_eq!(country_of(first), "DE");
    assert!(reloader.poll(false).is_none());

    // Rename over it.
    write(&scratch.path("new"), "FR");
    std::fs::rename(scratch.path("new"), &path).unwrap();
    assert!(reloader.poll(false).is_none(), "read before it was stable");
    assert_eq!(country_of(expect_replaced(reloader.poll(false))), "FR");
    assert!(reloader.poll(false).is_none());

    // Rewrite in place.
    write(&path, "SE");
    assert!(reloader.poll(false).is_none());
    assert_eq!(country_of(expect_replaced(reloader.poll(false))), "SE");

    // Broken in place: refused once, not at every poll.
    std::fs::write(&path, b"broken").unwrap();
    assert!(reloader.poll(false).is_none());
    assert!(matches!(reloader.poll(false), Some(Outcome::Refused(_))));
    assert!(reloader.poll(false).is_none());

    // Gone, then back.
    std::fs::remove_file(&path).unwrap();
    assert!(reloader.poll(false).is_none());
    assert!(matches!(reloader.poll(false), Some(Outcome::Refused(_))));
    assert!(reloader.poll(false).is_none());
    write(&path, "JP");
    assert!(reloader.poll(false).is_none());
    assert_eq!(country_of(expect_replaced(reloader.poll(false))), "JP");

    // SIGHUP reads it without any change.
    assert_eq!(country_of(expect_replaced(reloader.poll(true))), "JP");
    assert_eq!(reloader.counts(), (4, 2));
}

/// A Kubernetes volume: file → ..data/file, ..data → ..v1; the update swaps
/// `..data` by rename.
#[test]
fn a_kubernetes_symlink_swap_is_seen() {
    use std::os::unix::fs::symlink;
    let scratch = Scratch::new("kubernetes");
    for (version, country) in [("..v1", "DE"), ("..v2", "FR")] {
        std::fs::create_dir(scratch.path(version)).unwrap();
        write(&scratch.path(version).join("country.mmdb"), country);
    }
    symlink("..v1", scratch.path("..data")).unwrap();
    symlink("..data/country.mmdb", scratch.path("country.mmdb")).unwrap();
    let (mut reloader, first) = Reloader::open(&scratch.path("country.mmdb")).unwrap();
    assert_eq!(country_of(first), "DE");
    symlink("..v2", scratch.path("..data_tmp")).unwrap();
    std::fs::rename(scratch.path("..data_tmp"), scratch.path("..data")).unwrap();
    assert!(reloader.poll(false).is_none());
    assert_eq!(country_of(expect_replaced(reloader.poll(false))), "FR");
}

/// In a process of its own, since the limit is the process's.
#[test]
fn a_read_without_descriptors_is_retried_later() {
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "short_of_descriptors", "--ignored"])
        .env("CONNMON_SHORT", "")
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
#[ignore = "the child of a_read_without_descriptors_is_retried_later"]
fn short_of_descriptors() {
    if std::env::var_os("CONNMON_SHORT").is_none() {
        println!("not applicable: its parent runs it, in a process of its own");
        return;
    }
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let scratch = Scratch::new("short");
    let path = scratch.path("a.mmdb");
    write(&path, "DE");
    let (mut reloader, _) = Reloader::open(&path).unwrap();
    write(&path, "FR");
    assert!(reloader.poll(false).is_none());
    let before = getrlimit(Resource::Nofile);
    let none = Rlimit {
        current: Some(0),
        ..before
    };
    setrlimit(Resource::Nofile, none).unwrap();
    let refused = reloader.poll(false);
    let repeated = reloader.poll(false);
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(matches!(refused, Some(Outcome::Refused(error)) if error.is_resource_exhausted()));
    assert!(repeated.is_none());
    assert_eq!(reloader.counts(), (0, 1));
    let database = expect_replaced(reloader.poll(false));
    assert_eq!(country_of(database), "FR");
    assert!(reloader.poll(false).is_none());
}
