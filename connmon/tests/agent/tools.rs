//! `trace`, `list` and `top` beside what the test itself does.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use connmon_host::sandbox::{CapabilitySet, held};
use serde_json::Value;

use crate::harness::Agent;
use crate::namespaces;
use crate::privileges::{not_open, threads};
use crate::traffic::{Family, Pair, Server};
use crate::world::World;

/// Ports that no world has a server on, nor any other test.
const SERVED: u16 = 6000;
const CLOSED: u16 = 6001;

fn lines(output: &[u8]) -> Vec<Value> {
    String::from_utf8_lossy(output)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn tool(args: &[&str]) -> Command {
    let mut command = Agent::binary();
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// A `trace` that is attached.
struct Trace {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Trace {
    fn start(args: &[&str]) -> Self {
        let mut child = tool(&[&["trace"], args].concat()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        while !said.contains("tracing by ") {
            let more = stderr.read_line(&mut said).unwrap();
            assert!(more > 0, "it ended: {said}");
        }
        assert!(said.ends_with("; Ctrl-C ends it\n"), "{said}");
        Self { child, stderr }
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([name, &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// What it printed, and what it said after it was attached.
    fn end(mut self) -> (Output, String) {
        let output = self.child.wait_with_output().unwrap();
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        assert!(output.status.success(), "{said}");
        (output, said)
    }
}

fn process_name() -> String {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap();
    name.trim_end().to_owned()
}

#[test]
fn trace_prints_what_an_agent_counts_with_owners() {
    if !namespaces::may_run("trace beside an agent") {
        return;
    }
    let world = World::new();
    let database = world.database();
    let located = ["--geoip.database", database.to_str().unwrap()];
    let agent = Agent::start(&located);
    let listener = world.listen(SERVED);
    let ports = format!("{SERVED},{CLOSED}");
    let trace = Trace::start(
        &[
            &[
                "-o",
                "json",
                "--port",
                &ports,
                "--duration",
                "60",
                "--count",
                "5",
            ],
            &located[..],
        ]
        .concat(),
    );
    let client = world.outbound("JP", SERVED, 1).remove(0);
    let (server, _) = listener.accept().unwrap();
    let ends = (client.local_addr().unwrap(), client.peer_addr().unwrap());
    let mut pair = Pair { client, server };
    pair.exchange(1234, 99);
    pair.close();
    world.refused("DE", CLOSED);
    let (output, said) = trace.end();
    assert!(said.contains("5 events printed, 0 lost"), "{said}");
    let events = lines(&output.stdout);
    let one = |event: &str, direction: &str| -> &Value {
        let mut found = events
            .iter()
            .filter(|record| record["event"] == event && record["direction"] == direction);
        let record = found
            .next()
            .unwrap_or_else(|| panic!("{event} {direction}: {events:?}"));
        assert!(found.next().is_none(), "{events:?}");
        record
    };
    for record in &events {
        assert_eq!(record["pid"], std::process::id(), "{record}");
        assert_eq!(record["process"], process_name(), "{record}");
    }
    let open = one("open", "outbound");
    assert_eq!(
        (&open["country"], &open["port"]),
        (&"JP".into(), &SERVED.into())
    );
    assert_eq!(open["local"], ends.0.to_string());
    assert_eq!(open["remote"], ends.1.to_string());
    assert!(open["duration_seconds"].as_f64().unwrap() < 5.0);
    let open = one("open", "inbound");
    assert_eq!(
        (&open["country"], &open["port"]),
        (&"private".into(), &SERVED.into())
    );
    assert_eq!(open["local"], ends.1.to_string());
    for (direction, received, sent) in [("outbound", 99, 1234), ("inbound", 1234, 99)] {
        let close = one("close", direction);
        assert_eq!(close["received_bytes"], received, "{close}");
        assert_eq!(close["sent_bytes"], sent, "{close}");
    }
    let fail = one("fail", "outbound");
    assert_eq!(
        (&fail["reason"], &fail["country"]),
        (&"refused".into(), &"DE".into())
    );
    assert_eq!(fail["port"], CLOSED);
    agent.until("the agent counts them too", |scrape| {
        let outbound = ["opened", "closed"].map(|what| {
            let family = format!("connmon_port_connections_{what}_total");
            scrape.port(&family, SERVED, "outbound")
        });
        let refused = [("country", "DE"), ("reason", "refused")];
        outbound == [1.0, 1.0]
            && scrape.sum("connmon_country_connect_failures_total", &refused) == 1.0
    });
    agent.stop();
}

/// Nobody reads what it prints while events pile up: there is always more.
#[test]
fn trace_ends_on_a_signal_whatever_is_left_to_print() {
    if !namespaces::may_run("the end of a trace") {
        return;
    }
    let world = World::new();
    let mut trace = Trace::start(&["-o", "json"]);
    let bustle = world.bustle();
    let mut output = trace.child.stdout.take().unwrap();
    // More than a pipe holds and than is taken from the ring at once.
    sleep(Duration::from_secs(12));
    trace.signal("-INT");
    let asked = Instant::now();
    let mut chunk = [0; 4096];
    let mut read = 0;
    // Slower than events come.
    while let count @ 1.. = output.read(&mut chunk).unwrap() {
        read += count;
        assert!(
            asked.elapsed() < Duration::from_secs(30),
            "it goes on and on: {read} bytes"
        );
        sleep(Duration::from_millis(40));
    }
    assert!(read > 1 << 16, "{read} bytes are no backlog");
    drop(bustle);
    let (_, said) = trace.end();
    assert!(said.contains(" events printed, "), "{said}");
}

/// The mount of version 2 of the control groups.
fn unified() -> Option<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|root| root.join("cgroup.procs").exists() && root.join("cgroup.controllers").exists())
}

/// A control group as a container runtime makes it.
struct Container(PathBuf);

impl Container {
    fn new(root: &Path) -> std::io::Result<Self> {
        let id = format!("{:08x}{:056x}", std::process::id(), 0xc0ffee);
        let path = root.join(id);
        std::fs::create_dir(&path).map(|()| Self(path))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn trace_names_the_container_of_an_ended_process() {
    if !namespaces::may_run("containers in a trace") {
        return;
    }
    let container = match unified().map(|root| Container::new(&root)) {
        Some(Ok(container)) => container,
        Some(Err(error)) => {
            return println!("not applicable: containers in a trace: cgroup2: {error}");
        }
        None => return println!("not applicable: containers in a trace: no cgroup2 is mounted"),
    };
    let server = Server::new(Family::V4);
    let port = server.port();
    let trace = Trace::start(&[
        "-o",
        "json",
        "--filter.loopback",
        "include",
        "--port",
        &port.to_string(),
        "--direction",
        "outbound",
        "--count",
        "1",
        "--duration",
        "60",
    ]);
    // Until the process is gone.
    trace.signal("-STOP");
    let script = format!(
        "echo $$ > {}/cgroup.procs && exec 3<>/dev/tcp/127.0.0.1/{port}",
        container.0.display()
    );
    let connected = Command::new("bash").args(["-c", &script]).status().unwrap();
    assert!(connected.success());
    trace.signal("-CONT");
    let (output, said) = trace.end();
    let events = lines(&output.stdout);
    assert_eq!(events.len(), 1, "{said}");
    assert_eq!(events[0]["process"], "bash", "{events:?}");
    let id = container.0.file_name().unwrap().to_str().unwrap();
    assert_eq!(events[0]["container"], id[..12], "{events:?}");
}

#[test]
fn the_tools_give_up_what_they_do_not_need() {
    if !namespaces::may_run("the tools' sandbox") {
        return;
    }
    let owners = CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH;
    let most = owners | CapabilitySet::SYS_ADMIN | CapabilitySet::BPF;
    let trace = Trace::start(&["--duration", "60"]);
    let closed_in = threads(trace.child.id());
    assert!(closed_in.len() >= 2, "{closed_in:?}");
    for (name, kept, no_new_privs, seccomp) in &closed_in {
        assert_eq!(no_new_privs, "1", "{name}");
        assert!(most.contains(*kept), "{name}: {kept:?}");
        if name == "connmon-walker" {
            assert_eq!(seccomp, "2", "{closed_in:?}");
        } else {
            assert!(!kept.contains(CapabilitySet::SYS_ADMIN), "{name}: {kept:?}");
        }
    }
    not_open(trace.child.id(), 0);
    trace.signal("-INT");
    trace.end();
    let trace = Trace::start(&["--duration", "60", "--sandbox", "off"]);
    for (name, kept, no_new_privs, _) in threads(trace.child.id()) {
        assert_eq!((kept, no_new_privs.as_str()), (held(), "0"), "{name}");
    }
    trace.signal("-TERM");
    trace.end();
}

#[test]
fn list_is_what_is_connected_now_by_everything() {
    let server = Server::new(Family::V4);
    let held = server.pairs(6);
    let port = server.port();
    let list = |by: &str| {
        let output = tool(&["list", "-o", "json", "--by", by])
            .args(["--filter.loopback", "include"])
            .output()
            .unwrap();
        assert!(output.status.success());
        lines(&output.stdout)
    };
    let rows = list("connection");
    let outbound: Vec<_> = rows
        .iter()
        .filter(|row| row["direction"] == "outbound" && row["port"] == port)
        .collect();
    assert_eq!(outbound.len(), 6);
    let locals: BTreeSet<_> = outbound.iter().map(|row| row["local"].as_str()).collect();
    assert_eq!(locals.len(), 6);
    for row in outbound {
        assert_eq!(row["pid"], std::process::id(), "{row}");
        assert_eq!(row["process"], process_name(), "{row}");
        assert_eq!(row["state"], "established");
        assert_eq!(row["country"], "loopback");
    }
    for (by, key, value) in [
        ("port", "port", port.to_string()),
        ("country", "country", "loopback".to_owned()),
    ] {
        let groups = list(by);
        let count: u64 = groups
            .iter()
            .filter(|group| group[key] == *value)
            .map(|group| group["connections"].as_u64().unwrap())
            .sum();
        assert!(count >= 12, "{by}: {groups:?}");
    }
    assert!(
        list("process")
            .iter()
            .any(|group| group["outbound"].as_u64() >= Some(6))
    );
    drop(held);
}

#[test]
fn list_ends_quietly_when_its_reader_does() {
    let mut child = tool(&["list", "--filter.loopback", "include"])
        .spawn()
        .unwrap();
    // Long before it has read the tables.
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(said, "");
}
