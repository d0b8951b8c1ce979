//! Files of the configuration that are not regular files, or too large.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use connmon::database::MAX_DATABASE_BYTES;
use mmdb_writer::{Value, Writer};

use crate::harness::{Agent, PATIENCE};

fn make_fifo(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(made.success());
}

/// Exit code and stderr of an agent that is to end by itself.
fn refused(args: &[&str]) -> (i32, String) {
    let mut child = Agent::binary()
        .args(["--web.listen-address", "127.0.0.1:0", "--source", "proc"])
        .args(args)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let until = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > until {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the agent neither starts nor ends: {args:?}");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    let printed = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), printed)
}

#[test]
fn only_regular_files_are_read_at_the_start() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    make_fifo(&at("fifo"));
    let _socket = UnixListener::bind(at("socket")).unwrap();
    let kinds = [
        (at("fifo"), "a FIFO"),
        (at("socket"), "a socket"),
        (at(""), "a directory"),
        (PathBuf::from("/dev/zero"), "a character device"),
    ];
    let refusal = |path: &Path, kind: &str, args: &[&str]| {
        let (code, printed) = refused(args);
        let printed = printed.lines().last().unwrap_or_default();
        assert_eq!(code, 2, "{args:?}: {printed}");
        assert!(
            printed.contains(path.to_str().unwrap()),
            "{args:?}: {printed}"
        );
        let kind = format!("is {kind}, not a regular file");
        assert!(printed.contains(&kind), "{args:?}: {printed}");
    };
    for (path, kind) in &kinds {
        for flag in ["--web.config.file", "--config.file", "--geoip.database"] {
            refusal(path, kind, &[flag, path.to_str().unwrap()]);
        }
    }
    // What the web configuration names.
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(at("cert.pem"), key.cert.pem()).unwrap();
    fs::write(at("key.pem"), key.signing_key.serialize_pem()).unwrap();
    for files in [
        ["fifo", "key.pem", "cert.pem"],
        ["cert.pem", "fifo", "cert.pem"],
        ["cert.pem", "key.pem", "fifo"],
    ] {
        let [cert, key, ca] = files;
        let text = format!(
            "tls_server_config:\n  cert_file: {cert}\n  key_file: {key}\n  client_ca_file: {ca}\n  \
             client_auth_type: RequireAndVerifyClientCert\n"
        );
        fs::write(at("web.yml"), text).unwrap();
        let web = at("web.yml");
        refusal(
            &at("fifo"),
            "a FIFO",
            &["--web.config.file", web.to_str().unwrap()],
        );
    }
}

/// A database that places one network in DE, padded to this size.
fn database(bytes: u64) -> Vec<u8> {
    let mut writer = Writer::new("connmon-test");
    let network: ipnet::IpNet = "198.18.0.0/24".parse().unwrap();
    let record = Value::map([("country_code", Value::from("DE"))]);
    writer.insert_value(network, record).unwrap();
    let mut database = writer.to_bytes().unwrap();
    let marker = b"\xab\xcd\xefMaxMind.com";
    let data_end = database
        .windows(marker.len())
        .rposition(|bytes| bytes == marker)
        .unwrap();
    let padding = (bytes as usize).saturating_sub(database.len());
    database.splice(data_end..data_end, std::iter::repeat_n(0, padding));
    database
}

#[test]
fn a_file_replaced_by_a_fifo_stays_in_force() {
    let scratch = tempfile::tempdir().unwrap();
    let (web, geo) = (scratch.path().join("web.yml"), scratch.path().join("geo"));
    fs::write(&web, "{}\n").unwrap();
    fs::write(&geo, database(0)).unwrap();
    let agent = Agent::start(&[
        "--source",
        "proc",
        "--web.config.file",
        web.to_str().unwrap(),
        "--geoip.database",
        geo.to_str().unwrap(),
    ]);
    for file in [&web, &geo] {
        let fifo = scratch.path().join("fifo");
        make_fifo(&fifo);
        fs::rename(fifo, file).unwrap();
    }
    let failed = [("result", "failure")];
    agent.until("a database refused", |scrape| {
        scrape.sum("connmon_geoip_reloads_total", &failed) == 1.0
    });
    assert!(agent.get("/-/healthy").contains("healthy"));
    let log = agent.stop();
    for file in [&web, &geo] {
        let line = |line: &&str| line.contains(file.to_str().unwrap()) && line.contains("FIFO");
        assert_eq!(log.lines().filter(line).count(), 1, "{log}");
    }
}

/// Most memory that a process ever had, bytes.
fn peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() * 1024
}

#[test]
fn two_largest_databases_are_in_memory_and_no_more() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("geo.mmdb");
    let args = [
        "--source",
        "proc",
        "--geoip.database",
        path.to_str().unwrap(),
    ];
    let replace = |write: &dyn Fn(&Path)| {
        let new = scratch.path().join("new");
        write(&new);
        fs::rename(new, &path).unwrap();
    };
    let largest = database(MAX_DATABASE_BYTES);
    assert_eq!(largest.len() as u64, MAX_DATABASE_BYTES);
    replace(&|new| fs::write(new, &largest).unwrap());
    let agent = Agent::start(&args);
    for reloads in [1.0, 2.0, 3.0] {
        replace(&|new| fs::write(new, &largest).unwrap());
        agent.until("the database reloaded", |scrape| {
            scrape.sum("connmon_geoip_reloads_total", &[("result", "success")]) == reloads
        });
    }
    // And the agent itself.
    let most = 2 * MAX_DATABASE_BYTES + (48 << 20);
    assert!(peak(agent.pid()) < most, "{} bytes", peak(agent.pid()));

    let sparse = |new: &Path| fs::File::create(new).unwrap().set_len(1 << 30).unwrap();
    replace(&sparse);
    agent.until("the database refused", |scrape| {
        scrape.sum("connmon_geoip_reloads_total", &[("result", "failure")]) == 1.0
    });
    assert!(peak(agent.pid()) < most, "{} bytes", peak(agent.pid()));
    let log = agent.stop();
    assert!(log.contains("larger than the 64 MiB allowed"), "{log}");
    let (code, printed) = refused(&args[2..]);
    assert_eq!(code, 2, "{printed}");
    assert!(
        printed.contains("larger than the 64 MiB allowed"),
        "{printed}"
    );
}
