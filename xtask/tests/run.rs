//! `cargo xtask run`: which user builds, which runs, where it listens.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const XTASK: &str = env!("CARGO_BIN_EXE_xtask");
const LOOPBACK: &str = "--web.listen-address 127.0.0.1:19910";

/// A missing tool skips on a laptop and fails in CI.
fn skipped(what: &str, reason: &str) {
    println!("skipped: {what}: {reason}");
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "skipped in CI: {what}: {reason}"
    );
}

fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output().unwrap();
    output.stdout == b"0\n"
}

/// A directory with fake binaries for cargo and sudo, which write down how they
/// were called, and a copy of xtask that nobody may run.
struct Bench(PathBuf);

impl Bench {
    fn new(name: &str) -> Self {
        let place = std::env::temp_dir().join(format!("connmon-{name}-{}", std::process::id()));
        fs::create_dir(&place).unwrap();
        fs::set_permissions(&place, fs::Permissions::from_mode(0o777)).unwrap();
        let bench = Self(place);
        fs::create_dir(bench.0.join("bin")).unwrap();
        fs::copy(XTASK, bench.0.join("xtask")).unwrap();
        bench.fake("cargo", "cargo");
        bench.fake("sudo", "bin/sudo");
        bench
    }

    /// One line a call: name, user, arguments.
    fn fake(&self, name: &str, path: &str) {
        let log = self.0.join("log");
        let text = format!(
            "#!/bin/sh\nprintf '%s' \"{name} by $(/usr/bin/id -u):\" >> {log}\n\
             for word; do printf ' %s' \"$word\" >> {log}; done\necho >> {log}\n",
            log = log.display()
        );
        let path = self.0.join(path);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Runs `xtask run` as a user who is not root. What the fake binaries wrote
    /// down, and what was printed.
    fn run(&self, sudo: bool, variables: &[(&str, &str)], args: &[&str]) -> (Vec<String>, String) {
        let _ = fs::remove_file(self.0.join("log"));
        let mut prefix = unprivileged();
        prefix.push(self.0.join("xtask").display().to_string());
        let output = Command::new(&prefix[0])
            .args(&prefix[1..])
            .arg("run")
            .args(args)
            .env_clear()
            .env("PATH", self.0.join(if sudo { "bin" } else { "none" }))
            .env("CARGO", self.0.join("cargo"))
            .env("CARGO_TARGET_DIR", "/built here")
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        let log = fs::read_to_string(self.0.join("log")).unwrap_or_default();
        (
            log.lines().map(str::to_owned).collect(),
            String::from_utf8(text).unwrap(),
        )
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What to put before a command so that it is not root's: nothing for who is
/// not root; another user; and where that user may not enter the checkout,
/// a user namespace that maps nobody.
fn unprivileged() -> Vec<String> {
    let nobody = "/usr/bin/setpriv --reuid=65534 --regid=65534 --clear-groups";
    let candidates = ["/usr/bin/env", nobody, "/usr/bin/unshare --user"];
    let checkout = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let script = "test \"$(id -u)\" != 0 && cd \"$0\"";
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let works = |line: &&str| {
        let line = words(line);
        let mut command = Command::new(&line[0]);
        command
            .args(&line[1..])
            .args(["sh", "-c", script, checkout]);
        command.output().is_ok_and(|output| output.status.success())
    };
    words(
        candidates
            .iter()
            .find(|line| works(line))
            .expect("a way not to be root"),
    )
}

#[test]
fn the_caller_builds_and_only_the_agent_is_roots() {
    let bench = Bench::new("run");
    let (log, _) = bench.run(true, &[], &["--", "--filter.loopback", "include"]);
    assert_eq!(log.len(), 2, "{log:?}");
    let (user, arguments) = log[0].split_once(": ").unwrap();
    assert_ne!(user, "cargo by 0");
    assert_eq!(
        arguments,
        "build --release --locked --package connmon --quiet"
    );
    let (user, arguments) = log[1].split_once(": ").unwrap();
    assert!(user.starts_with("sudo by "), "{user}");
    assert_eq!(
        arguments,
        format!("-- /built here/release/connmon {LOOPBACK} --filter.loopback include")
    );
}

#[test]
fn settings_of_the_environment_reach_the_agent() {
    let bench = Bench::new("environment");
    let variables = [
        ("CONNMON_SOURCE", "proc"),
        ("OTHER", "1"),
        ("CONNMON_LOG_LEVEL", "debug"),
    ];
    let (log, _) = bench.run(true, &variables, &[]);
    let kept = log[1].split_once("--preserve-env=").unwrap().1;
    let mut kept: Vec<&str> = kept.split(' ').next().unwrap().split(',').collect();
    kept.sort_unstable();
    assert_eq!(kept, ["CONNMON_LOG_LEVEL", "CONNMON_SOURCE"]);
}

#[test]
fn it_listens_on_loopback_unless_set_otherwise() {
    let bench = Bench::new("listen");
    let (named, other) = (bench.0.join("named.yml"), bench.0.join("other.yml"));
    fs::write(&named, "web.listen-address: [\":1\"]\n").unwrap();
    fs::write(&other, "# web.listen-address: :1\nsource: proc\n").unwrap();
    let (named, other) = (named.to_str().unwrap(), other.to_str().unwrap());
    let in_env = |file| [("CONNMON_CONFIG_FILE", file)];
    let equals = format!("--config.file={other}");
    for (variables, args, added) in [
        (vec![], vec!["--web.listen-address", ":1"], false),
        (vec![], vec!["--web.listen-address=:1"], false),
        (vec![("CONNMON_WEB_LISTEN_ADDRESS", ":1")], vec![], false),
        (vec![], vec!["--config.file", named], false),
        (in_env(named).to_vec(), vec![], false),
        (vec![], vec!["--config.file", other], true),
        (vec![], vec![equals.as_str()], true),
        (in_env(other).to_vec(), vec![], true),
        (vec![], vec!["--web.listen-addresses", "x"], true),
    ] {
        let args: Vec<&str> = std::iter::once("--").chain(args).collect();
        let (log, printed) = bench.run(true, &variables, &args);
        assert_eq!(log.len(), 2, "{printed}");
        assert_eq!(log[1].contains(LOOPBACK), added, "{variables:?}: {log:?}");
    }
}

#[test]
fn without_sudo_the_command_is_one_to_type() {
    let bench = Bench::new("typed");
    let variables = [("CONNMON_PORTS_ALLOW", "it's 1")];
    let (log, printed) = bench.run(false, &variables, &["--", "--source", "a b"]);
    assert_eq!(log.len(), 1, "{log:?}");
    let typed = printed.lines().last().unwrap().trim();
    // A shell reads the words back.
    let script = format!(
        "run() {{ printf '%s\\n' \"$CONNMON_PORTS_ALLOW\" \"$@\"; }}\n{}",
        typed.replace("'/built here/release/connmon'", "run")
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let words = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = words.lines().collect();
    let expected = [
        "it's 1",
        "--web.listen-address",
        "127.0.0.1:19910",
        "--source",
        "a b",
    ];
    assert_eq!(words, expected, "{printed}");
    assert!(!typed.contains("sudo"), "{typed}");
}

/// The agent beside this test's own binary, built if it is not there.
fn agent() -> PathBuf {
    let path = Path::new(XTASK).with_file_name("connmon");
    if !path.exists() {
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--locked", "--package=connmon"])
            .status()
            .unwrap();
        assert!(status.success());
    }
    path
}

fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let timeout = Some(Duration::from_secs(30));
    stream.set_read_timeout(timeout).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Countries with a connection now.
fn countries(scrape: &str) -> usize {
    let mut found: Vec<&str> = scrape
        .lines()
        .filter(|line| !line.ends_with(" 0"))
        .filter_map(|line| line.strip_prefix("connmon_country_connections{country=\""))
        .filter_map(|rest| rest.split('"').next())
        .filter(|country| country.len() == 2)
        .collect();
    found.sort_unstable();
    found.dedup();
    found.len()
}

#[test]
fn the_demo_shows_countries_and_leaves_nothing_behind() {
    if !is_root() {
        return skipped("the demo", "making network namespaces needs root");
    }
    let mut demo = Command::new(XTASK)
        .args(["demo", "--agent"])
        .arg(agent())
        .args(["--", "--web.listen-address", "127.0.0.1:0"])
        // After sudo it names another directory than the build's, or one that
        // is not there.
        .env("CARGO_TARGET_DIR", "/nowhere")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(demo.stderr.take().unwrap()).lines();
    let mut printed = String::new();
    let address = loop {
        let Some(line) = lines.next() else {
            panic!("the demo ended: {printed}");
        };
        let line = line.unwrap();
        if let Some((_, rest)) = line.split_once("http://") {
            break rest.split('/').next().unwrap().to_owned();
        }
        printed += &line;
    };
    // Read on, so that nobody waits for the pipe.
    let reader = std::thread::spawn(move || lines.map_while(Result::ok).last());
    let until = Instant::now() + Duration::from_secs(60);
    let mut scrape = String::new();
    while countries(&scrape) < 5 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(200));
        scrape = get(&address, "/metrics");
    }
    let summary = get(&address, "/api/v1/summary");
    let exists = |name| Path::new("/run/netns").join(name).exists();
    let namespaces = ["connmon-demo-here", "connmon-demo-world"];
    let there = namespaces.map(exists);
    let kill = Command::new("kill")
        .args(["-TERM", &demo.id().to_string()])
        .status();
    let status = demo.wait().unwrap();
    assert!(kill.unwrap().success());
    let _ = reader.join();
    assert!(countries(&scrape) >= 5, "{scrape}");
    assert!(scrape.contains("\nconnmon_demo 1\n"), "{scrape}");
    assert!(summary.contains("\"demo\":true"), "{summary}");
    assert_eq!(there, [true, true]);
    assert!(status.success(), "{status}");
    assert_eq!(namespaces.map(exists), [false, false]);
}
