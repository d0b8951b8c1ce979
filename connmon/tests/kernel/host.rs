//! What the host lacks, and what the agent then reports and does.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::panic::resume_unwind;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use connmon_core::probe::Probe;
use connmon_host::kernel::kernel_version;
use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
use rustix::thread::UnshareFlags;
use serde_json::Value;

use crate::harness::Agent;
use crate::raw;
use crate::scenarios::listen;
use crate::traffic::{Family, Server};
use crate::world::{CLOSED, OPENED, Outcome, Rung, World, in_guest};

const METHODS: [&str; 7] = [
    "tp_btf",
    "tracepoint",
    "fentry",
    "fexit",
    "kprobe",
    "kretprobe",
    "none",
];

pub fn attach(world: &mut World<'_>) -> Outcome {
    let scrape = world.agent.scrape();
    let probes = ["inet_sock_set_state", "tcp_connect", "inet_csk_accept"];
    let shown = |probe: &str, method: &str| {
        let value = if method == "none" { 0.0 } else { 1.0 };
        scrape.get(
            "connmon_probe_attached",
            &[("probe", probe), ("method", method)],
        ) == Some(value)
    };
    let log = world.agent.log();
    if in_guest()
        && let Some(methods) = world.rung.methods()
    {
        for (probe, method) in probes.into_iter().zip(methods) {
            assert!(shown(probe, method), "{probe} is not by {method}: {log}");
        }
    }
    let summary = world.agent.get("/api/v1/summary");
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    for (at, probe) in probes.into_iter().enumerate() {
        let top = match probe {
            "inet_sock_set_state" => "tp_btf",
            "tcp_connect" => "fentry",
            _ => "fexit",
        };
        // Below the top there is a reason.
        let shown_probe = &summary["agent"]["probes"][at];
        assert_eq!(shown_probe["probe"], probe);
        let reason = &shown_probe["reason"];
        assert_eq!(reason.is_null(), shown(probe, top), "{probe}: {reason}");
    }
    // The agent and our own tracer climbed to the same rungs.
    if let Some(tracer) = &world.tracer {
        for rung in tracer.rungs() {
            let (probe, method) = (rung.probe.label(), rung.method.label());
            assert!(shown(probe, method), "{probe} is not by {method}: {log}");
        }
    }
    Outcome::Held
}

/// What `connmon check` reports of each probe is what the agent then has.
pub fn check(world: &mut World<'_>) -> Outcome {
    let command = Agent::binary();
    let args = match world.rung {
        Rung::Proc => ["--source", "proc"],
        rung => ["--ebpf.attach", rung.name()],
    };
    let (code, lines) = checked(command, &args);
    let said = format!("{lines:#?}");
    let degraded = lines.iter().any(|line| line["result"] == "degraded");
    assert_eq!(code == Some(3), degraded, "{said}");
    if !world.traced() {
        return Outcome::Held;
    }
    let scrape = world.agent.scrape();
    for probe in Probe::ALL.map(Probe::label) {
        let line = lines
            .iter()
            .find(|line| line["check"] == format!("probe {probe}"))
            .unwrap_or_else(|| panic!("no line about {probe}:\n{said}"));
        let attached = scrape.sum("connmon_probe_attached", &[("probe", probe)]) == 1.0;
        let cause = line["cause"].as_str().unwrap();
        let method = METHODS
            .iter()
            .find(|method| {
                let labels = [("probe", probe), ("method", **method)];
                scrape.get("connmon_probe_attached", &labels).is_some()
            })
            .unwrap();
        assert!(attached || line["result"] != "ok", "{line}");
        assert!(!attached || cause.contains(method), "{method}: {line}");
    }
    Outcome::Held
}

/// Exit code and lines of `connmon check -o json`.
fn checked(mut command: Command, args: &[&str]) -> (Option<i32>, Vec<Value>) {
    let output = command.args(["check", "-o", "json"]).args(args).output();
    let output = output.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let code = output.status.code();
    assert!(matches!(code, Some(0 | 3)), "{code:?}:\n{said}");
    let lines = said.lines().map(|line| serde_json::from_str(line).unwrap());
    (code, lines.collect())
}

/// The line about something.
fn about<'a>(lines: &'a [Value], check: &str) -> &'a Value {
    lines
        .iter()
        .find(|line| line["check"] == check)
        .unwrap_or_else(|| panic!("no line about {check}: {lines:#?}"))
}

/// An agent of its own counts a few connections exactly, some of them from
/// before its start.
fn counts_exactly(listening: &Server, start: impl FnOnce() -> Agent) -> Agent {
    let port = listening.port();
    let old = listening.pairs(2);
    let agent = start();
    let are = |scrape: &crate::harness::Scrape, family: &str, count: f64| {
        ["inbound", "outbound"]
            .iter()
            .all(|direction| scrape.port(family, port, direction) == count)
    };
    const GAUGE: &str = "connmon_port_connections";
    agent.until("what was there", |scrape| are(scrape, GAUGE, 2.0));
    let new = listening.pairs(3);
    agent.until("what came", |scrape| {
        are(scrape, GAUGE, 5.0) && are(scrape, OPENED, 3.0)
    });
    for pair in old.into_iter().chain(new) {
        pair.close();
    }
    agent.until("the end", |scrape| {
        are(scrape, GAUGE, 0.0) && are(scrape, OPENED, 3.0) && are(scrape, CLOSED, 5.0)
    });
    agent
}

/// Runs `inside` on a thread to whose mount namespace the kernel's BTF is an
/// empty file; programs that it starts share that view.
fn without_btf<T: Send>(inside: impl FnOnce() -> T + Send) -> T {
    let hidden = || {
        #[expect(unsafe_code, reason = "the only way to get a mount namespace")]
        // SAFETY: no file descriptors are unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", flags).unwrap();
        let empty = std::env::temp_dir().join(format!("connmon-no-btf-{}", std::process::id()));
        std::fs::write(&empty, "").unwrap();
        mount_bind(&empty, "/sys/kernel/btf/vmlinux").unwrap();
        std::fs::remove_file(&empty).unwrap();
        inside()
    };
    std::thread::scope(|scope| scope.spawn(hidden).join())
        .unwrap_or_else(|panic| resume_unwind(panic))
}

/// Without BTF the classic tracepoint counts the same; what is read by
/// offsets is absent, not zero.
pub fn no_btf(world: &mut World<'_>) -> Outcome {
    let listening = listen(world, Family::V4);
    let args = world.rung.args();
    let agent = without_btf(|| {
        let (code, lines) = checked(Agent::binary(), &["--ebpf.attach", world.rung.name()]);
        assert_eq!(code, Some(3));
        for check in ["btf", "traffic", "probe inet_sock_set_state"] {
            let line = about(&lines, check);
            assert_eq!(line["result"], "degraded", "{line}");
            assert_ne!(line["remedy"], "", "{line}");
        }
        counts_exactly(&listening, || Agent::start(&args))
    });
    // Namespaces cannot be distinguished.
    let polling = without_btf(|| Agent::start(&["--netns", "host"]));
    let by = [("source", "proc")];
    assert_eq!(polling.scrape().get("connmon_source_info", &by), Some(1.0));
    polling.stop();
    let scrape = agent.scrape();
    let state = Probe::SetState.label();
    let by = [("probe", state), ("method", "tracepoint")];
    assert_eq!(scrape.get("connmon_probe_attached", &by), Some(1.0));
    for family in [
        "connmon_port_sent_bytes_total",
        "connmon_port_received_bytes_total",
        "connmon_port_retransmitted_segments_total",
        "connmon_country_sent_bytes_total",
        "connmon_country_received_bytes_total",
        "connmon_country_retransmitted_segments_total",
        "connmon_rtt_seconds_count",
        "connmon_country_rtt_seconds_count",
    ] {
        assert!(!scrape.has(family), "{family} cannot be known");
    }
    agent.stop();
    Outcome::Held
}

/// A module taken out, and put back.
struct Unloaded(&'static str);

impl Unloaded {
    fn new(name: &'static str) -> Result<Self, String> {
        let output = Command::new("rmmod").arg(name).output();
        let output = output.map_err(|error| format!("rmmod: {error}"))?;
        if output.status.success() {
            return Ok(Self(name));
        }
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

impl Drop for Unloaded {
    fn drop(&mut self) {
        let path = format!("/lib/modules/{}.ko", self.0);
        let status = Command::new("insmod").arg(path).status();
        assert!(status.is_ok_and(|status| status.success()), "{}", self.0);
    }
}

/// Where the kernel has no tcp_diag and cannot load it, /proc is read.
pub fn tcp_diag(world: &mut World<'_>) -> Outcome {
    if !in_guest() {
        return Outcome::NotApplicable("no module is taken out of a host's kernel".into());
    }
    let _gone = match Unloaded::new("tcp_diag") {
        Ok(gone) => gone,
        Err(why) => return Outcome::NotApplicable(why),
    };
    let (code, lines) = checked(Agent::binary(), &[]);
    assert_eq!(code, Some(3));
    let line = about(&lines, "tcp_diag");
    assert_eq!(line["result"], "degraded", "{line}");
    let remedy = line["remedy"].as_str().unwrap();
    assert!(remedy.contains("modprobe tcp_diag"), "{line}");
    let listening = listen(world, Family::V4);
    let args = world.rung.args();
    let agent = counts_exactly(&listening, || Agent::start(&args));
    let scrape = agent.scrape();
    let namespaces = |access| scrape.sum("connmon_network_namespaces", &[("access", access)]);
    assert!(namespaces("proc") >= 1.0 && namespaces("diag") == 0.0);
    agent.stop();
    Outcome::Held
}

const CAP_DAC_READ_SEARCH: u64 = 1 << 2;
const CAP_SYS_PTRACE: u64 = 1 << 19;
const CAP_SYS_ADMIN: u64 = 1 << 21;
const CAP_BPF: u64 = 1 << 39;

/// What is left to each thread of the agent, by the kernel's word.
pub fn sandbox(world: &mut World<'_>) -> Outcome {
    let mut threads = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", world.agent.pid())).unwrap() {
        let task = task.unwrap().path();
        let name = std::fs::read_to_string(task.join("comm")).unwrap();
        let status = std::fs::read_to_string(task.join("status")).unwrap();
        let field = |key: &str| {
            let mut lines = status.lines();
            let line = lines.find_map(|line| line.strip_prefix(key)).unwrap();
            line.trim_start_matches(':').trim().to_owned()
        };
        let name = name.trim().to_owned();
        assert_eq!(field("NoNewPrivs"), "1", "{name}");
        assert_eq!(field("Seccomp"), "2", "{name}");
        let permitted = u64::from_str_radix(&field("CapPrm"), 16).unwrap();
        let allowed = match name.as_str() {
            "connmon-walker" => CAP_SYS_ADMIN | CAP_SYS_PTRACE | CAP_DAC_READ_SEARCH,
            // 5.10 refuses every bpf(2) command without it.
            "connmon-fold" if kernel_version() < (6, 1) => CAP_BPF,
            _ => 0,
        };
        let exact = name != "connmon-walker";
        assert_eq!(permitted & !allowed, 0, "{name}: {permitted:x}");
        assert!(!exact || permitted == allowed, "{name}: {permitted:x}");
        threads.push(name);
    }
    for name in ["connmon-walker", "connmon-fold"] {
        assert!(threads.iter().any(|thread| thread == name), "{threads:?}");
    }
    strict();
    Outcome::Held
}

/// `--sandbox strict` fails where the kernel lacks a wall, and names it.
fn strict() {
    let strict = ["--sandbox", "strict"];
    // Landlock came with 5.13.
    if kernel_version() >= (5, 13) {
        Agent::start(&strict).stop();
        return;
    }
    let address = ["--web.listen-address", "127.0.0.1:0"];
    let output = Agent::binary().args(strict).args(address).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("--sandbox strict") && said.contains("landlock"),
        "{said}"
    );
}

/// Runs [`without_first_thread`] in a process of its own.
pub const WITHOUT_FIRST_THREAD: &str = "--without-first-thread";

/// Listens on a later thread, says where, and ends the first.
pub fn without_first_thread() -> ! {
    std::thread::spawn(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        println!("{}", listener.local_addr().unwrap().port());
        std::thread::sleep(Duration::from_secs(600));
        std::process::exit(1);
    });
    raw::end_thread()
}

/// `/proc/<pid>/fd` is empty once the first thread of a process has ended; the
/// others show its descriptors.
pub fn first_thread_ended(world: &mut World<'_>) -> Outcome {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .arg(WITHOUT_FIRST_THREAD)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    let port = said.next().unwrap().unwrap();
    let pid = child.id().to_string();
    let shown = format!("/proc/{pid}/fd");
    let until = Instant::now() + Duration::from_secs(10);
    while std::fs::read_dir(&shown).unwrap().count() > 0 {
        assert!(Instant::now() < until, "its first thread has not ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    let agent = Agent::start(&world.rung.args());
    agent.until("the listener's owner", |scrape| {
        let labels = [("port", port.as_str()), ("pid", pid.as_str())];
        scrape.sum("connmon_listening_socket_info", &labels) == 1.0
    });
    assert!(child.try_wait().unwrap().is_none(), "it goes on");
    child.kill().unwrap();
    child.wait().unwrap();
    agent.stop();
    Outcome::Held
}
