//! Least privilege: the agent as an unprivileged user with exactly the
//! capabilities of a feature, and what each set gives; and what each thread
//! keeps once the agent runs.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use connmon_host::sandbox::{self, CapabilitySet, held};
use serde_json::Value;

use crate::harness::{Agent, Scrape};
use crate::namespaces::{Namespace, Resident, may_run, wait_until};

/// `nobody`, anywhere.
const NOBODY: &str = "65534";

const COUNT: &str = "+bpf,+perfmon";
const NAMES: &str = "+bpf,+perfmon,+sys_ptrace,+dac_read_search";
const DIAG: &str = "+bpf,+perfmon,+sys_ptrace,+dac_read_search,+sys_admin";

/// A copy of the agent that any user may run.
struct Everyones(tempfile::TempDir);

impl Everyones {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let open = || Permissions::from_mode(0o755);
        std::fs::set_permissions(directory.path(), open()).unwrap();
        let this = Self(directory);
        // Not by this process: whatever other tests fork meanwhile would have
        // it open for writing, and execve would refuse it.
        let copied = Command::new("cp")
            .arg(env!("CARGO_BIN_EXE_connmon"))
            .arg(this.binary())
            .status()
            .unwrap();
        assert!(copied.success());
        std::fs::set_permissions(this.binary(), open()).unwrap();
        this
    }

    fn binary(&self) -> PathBuf {
        self.0.path().join("connmon")
    }

    /// The agent as nobody, with these ambient capabilities and no others.
    fn start(&self, capabilities: &str, args: &[&str]) -> Agent {
        let mut command = self.command(NOBODY, capabilities);
        command
            .args([
                "run",
                "--filter.loopback",
                "include",
                "--log.level",
                "debug",
            ])
            .args(args);
        Agent::spawn(command)
    }

    /// The binary as some user, with these ambient capabilities and no others.
    fn command(&self, user: &str, capabilities: &str) -> Command {
        let set = format!("-all,{capabilities}");
        let set = set.trim_end_matches(',');
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", user, "--regid", NOBODY, "--clear-groups"])
            .args([
                "--inh-caps",
                set,
                "--ambient-caps",
                set,
                "--bounding-set",
                set,
            ])
            .arg(self.binary());
        command
    }

    /// What `check` reports on each feature, in the order of the table, and on
    /// everything by name.
    fn check(&self, capabilities: &str) -> (Vec<String>, BTreeMap<String, Value>) {
        let output = self
            .command(NOBODY, capabilities)
            .args(["check", "-o", "json"])
            .output()
            .unwrap();
        let lines = String::from_utf8(output.stdout).unwrap();
        let lines: BTreeMap<String, Value> = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .map(|line: Value| (line["check"].as_str().unwrap().to_owned(), line))
            .collect();
        let degraded = lines.values().any(|line| line["result"] == "degraded");
        assert_eq!(
            output.status.code(),
            Some(if degraded { 3 } else { 0 }),
            "{lines:#?}"
        );
        let features = sandbox::FEATURES.iter().map(|feature| {
            let line = &lines[&format!("feature: {}", feature.name)];
            let result = line["result"].as_str().unwrap();
            let (cause, remedy) = (line["cause"].as_str().unwrap(), &line["remedy"]);
            assert_eq!(result == "ok", cause.ends_with(" held"), "{line}");
            assert_eq!(result == "degraded", remedy != "", "{line}");
            result.to_owned()
        });
        (features.collect(), lines)
    }
}

/// A listener with one connection, on loopback in some namespace.
struct Service {
    listener: TcpListener,
    _ends: [TcpStream; 2],
}

impl Service {
    fn new() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        Self {
            listener,
            _ends: [client, server],
        }
    }

    fn port(&self) -> u16 {
        self.listener.local_addr().unwrap().port()
    }
}

/// A service here, one in a namespace of its own with a process in it.
struct World {
    here: Service,
    there: Service,
    _resident: Resident,
    _namespace: Namespace,
}

impl World {
    fn new() -> Self {
        let namespace = Namespace::new();
        Self {
            here: Service::new(),
            there: namespace.run(Service::new),
            _resident: namespace.resident(),
            _namespace: namespace,
        }
    }
}

fn runnable(what: &str) -> bool {
    if !may_run(what) {
        return false;
    }
    if Command::new("setpriv").arg("--version").output().is_err() {
        crate::support::skipped(what, "no setpriv (Debian: util-linux)");
        return false;
    }
    true
}

fn source(scrape: &Scrape) -> &'static str {
    match scrape.get("connmon_source_info", &[("source", "ebpf")]) {
        Some(1.0) => "ebpf",
        _ => "proc",
    }
}

fn access(scrape: &Scrape, access: &str) -> f64 {
    scrape.sum("connmon_network_namespaces", &[("access", access)])
}

/// Whether the listener on a port is listed with this process name.
fn owner_is(scrape: &Scrape, port: u16, process: &str) -> bool {
    let labels = [("port", port.to_string()), ("process", process.to_owned())];
    let labels: Vec<(&str, &str)> = labels.iter().map(|(a, b)| (*a, b.as_str())).collect();
    scrape
        .get("connmon_listening_socket_info", &labels)
        .is_some()
}

/// Name of a thread of this process, the owner of the listeners above.
fn own_name() -> String {
    std::fs::read_to_string("/proc/self/comm")
        .unwrap()
        .trim()
        .to_owned()
}

/// Opens and closes ten connections and expects them all to be counted.
fn counts_ten(agent: &Agent) {
    let service = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = service.local_addr().unwrap().port();
    for _ in 0..10 {
        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        drop(service.accept().unwrap());
        drop(client);
    }
    let opened = "connmon_port_connections_opened_total";
    agent.until("ten short connections", |scrape| {
        scrape.port(opened, port, "inbound") == 10.0
    });
}

#[test]
fn bpf_and_perfmon_count() {
    if !runnable("counting with two capabilities") {
        return;
    }
    let (world, everyones) = (World::new(), Everyones::new());
    let agent = everyones.start(COUNT, &["--source", "ebpf"]);
    let scrape = agent.scrape();
    assert_eq!(source(&scrape), "ebpf");
    counts_ten(&agent);
    assert_eq!(scrape.connections(world.here.port(), "inbound"), 1.0);
    // The files of another user's process are closed.
    assert!(
        owner_is(&scrape, world.here.port(), "unknown"),
        "{}",
        scrape.text
    );
    assert_eq!(access(&scrape, "diag"), 1.0);
    agent.stop();
}

#[test]
fn ptrace_and_dac_read_search_give_names() {
    if !runnable("names with four capabilities") {
        return;
    }
    let (world, everyones) = (World::new(), Everyones::new());
    let agent = everyones.start(NAMES, &["--source", "ebpf"]);
    let scrape = agent.scrape();
    assert_eq!(source(&scrape), "ebpf");
    // On a host with many descriptors owners follow the initial scan.
    agent.until("the owner's name", |scrape| {
        owner_is(scrape, world.here.port(), &own_name())
    });
    // Without CAP_SYS_ADMIN other namespaces are read through /proc.
    assert_eq!(access(&scrape, "diag"), 1.0);
    assert!(access(&scrape, "proc") >= 1.0);
    assert_eq!(scrape.connections(world.there.port(), "inbound"), 1.0);
    agent.stop();
}

#[test]
fn sys_admin_gives_sock_diag_in_other_namespaces() {
    if !runnable("sock_diag elsewhere with five capabilities") {
        return;
    }
    let (world, everyones) = (World::new(), Everyones::new());
    let agent = everyones.start(DIAG, &["--source", "ebpf"]);
    let scrape = agent.scrape();
    assert!(access(&scrape, "diag") >= 2.0, "{}", agent.log());
    assert_eq!(scrape.connections(world.there.port(), "inbound"), 1.0);
    // On a host with many descriptors owners follow the initial scan.
    agent.until("the owner's name", |scrape| {
        owner_is(scrape, world.there.port(), &own_name())
    });
    agent.stop();
}

#[test]
fn without_capabilities_it_polls_with_a_reason() {
    if !runnable("polling without a capability") {
        return;
    }
    let (world, everyones) = (World::new(), Everyones::new());
    let agent = everyones.start("", &["--proc.interval", "1s"]);
    let scrape = agent.scrape();
    assert_eq!(source(&scrape), "proc");
    assert_eq!(scrape.connections(world.here.port(), "inbound"), 1.0);
    let log = agent.log();
    assert!(log.contains("CAP_PERFMON and CAP_BPF missing"), "{log}");
    agent.stop();
}

#[test]
fn check_reports_what_each_set_gives() {
    if !runnable("check with some capabilities") {
        return;
    }
    let everyones = Everyones::new();
    for (set, tracing, owners, elsewhere) in [
        ("", "degraded", "degraded", "degraded"),
        (COUNT, "ok", "degraded", "degraded"),
        (NAMES, "ok", "ok", "degraded"),
        (DIAG, "ok", "ok", "ok"),
    ] {
        let (features, lines) = everyones.check(set);
        assert_eq!(features[..3], [tracing, owners, elsewhere], "{set}");
        // What the configuration does not need is not reported missing.
        assert!(
            features[3..].iter().all(|result| result != "degraded"),
            "{set}"
        );
        let all = if set == DIAG { "ok" } else { "degraded" };
        assert_eq!(lines["capabilities"]["result"], all, "{set}");
        let state = &lines["probe inet_sock_set_state"];
        if tracing == "ok" {
            assert!(!lines.contains_key("tracing"), "{set}: {lines:#?}");
            assert!(state["cause"] != "none", "{state}");
        } else {
            let cause = "none: missing capability CAP_PERFMON and CAP_BPF";
            assert_eq!(
                (&state["result"], &state["cause"]),
                (&"degraded".into(), &cause.into())
            );
            assert_eq!(lines["ring buffer"]["cause"], cause);
            let traffic = lines["traffic"]["cause"].as_str().unwrap();
            assert!(traffic.starts_with("polling: "), "{traffic}");
        }
    }
}

/// Programs in the kernel that a user loaded.
fn programs_of(user: u32) -> usize {
    aya::programs::loaded_programs()
        .filter(|program| {
            // One may end while the list is read.
            let program = program.as_ref().ok();
            program.and_then(aya::programs::ProgramInfo::created_by_uid) == Some(user)
        })
        .count()
}

/// What a user has pinned.
fn pins_of(user: u32) -> usize {
    let pins = std::fs::read_dir("/sys/fs/bpf").into_iter().flatten();
    pins.filter_map(|pin| pin.ok()?.metadata().ok())
        .filter(|pin| pin.uid() == user)
        .count()
}

/// As a user of its own: others on this machine attach programs too.
#[test]
fn check_leaves_nothing_behind() {
    if !runnable("what check leaves behind") {
        return;
    }
    let everyones = Everyones::new();
    let user = 1_000_000 + std::process::id();
    let run = |args: &[&str]| {
        let mut command = everyones.command(&user.to_string(), DIAG);
        command.args(args);
        command
    };
    // The check below finds a running program.
    let agent = Agent::spawn(run(&["run", "--source", "ebpf"]));
    assert!(programs_of(user) > 0);
    agent.stop();
    wait_until(|| programs_of(user) == 0);
    let output = run(&["check"]).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(
        printed.contains("ok        probe inet_sock_set_state: "),
        "{printed}"
    );
    // The kernel frees them a moment after their last reference.
    wait_until(|| programs_of(user) == 0);
    assert_eq!(pins_of(user), 0);
}

/// Name → (permitted capabilities, NoNewPrivs, Seccomp) of a process' threads.
pub fn threads(pid: u32) -> Vec<(String, CapabilitySet, String, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok())
        .map(|status| {
            let field = |key: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(key));
                line.unwrap().trim().to_owned()
            };
            let permitted = u64::from_str_radix(&field("CapPrm:"), 16).unwrap();
            (
                field("Name:"),
                CapabilitySet::from_bits_retain(permitted),
                field("NoNewPrivs:"),
                field("Seccomp:"),
            )
        })
        .collect()
}

#[test]
fn after_attaching_each_thread_keeps_what_it_needs() {
    if !runnable("threads of a running agent") {
        return;
    }
    let agent = Agent::start(&["--filter.loopback", "include", "--log.level", "debug"]);
    closed_in(agent.pid());
    agent.stop();
}

/// Passwords are hashed on threads that start when the first one comes.
#[test]
fn password_threads_are_in_the_sandbox() {
    if !runnable("threads of an agent with a password") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("web.yml");
    let hash = bcrypt::hash("secret", 4).unwrap();
    std::fs::write(&file, format!("basic_auth_users:\n  amy: {hash}\n")).unwrap();
    let mut agent = Agent::start(&["--web.config.file", file.to_str().unwrap()]);
    for (password, status) in [("wrong", "401"), ("secret", "200")] {
        let credentials =
            base64::engine::general_purpose::STANDARD.encode(format!("amy:{password}"));
        let mut stream = TcpStream::connect(agent.address()).unwrap();
        write!(
            stream,
            "GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {credentials}\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    closed_in(agent.pid());
    let threads = threads(agent.pid());
    let pool = threads.iter().any(|(name, ..)| name == "tokio-rt-worker");
    assert!(pool, "{threads:?}");
    // Scrapes need the password, so other tests check the laws.
    agent.signal(15);
    assert!(agent.wait().success(), "{}", agent.log());
}

/// Checks every thread of an agent.
fn closed_in(main: u32) {
    let walker_needs =
        CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH;
    wait_until(|| threads(main).iter().all(|(.., seccomp)| seccomp == "2"));
    let threads = threads(main);
    println!("{threads:#?}");
    assert!(threads.len() >= 3);
    let mut walkers = 0;
    for (name, kept, no_new_privs, _) in &threads {
        assert_eq!(no_new_privs, "1", "{name}");
        if kept.contains(walker_needs & held()) {
            walkers += 1;
            assert!(walker_needs.contains(*kept), "{name}: {kept:?}");
        } else {
            // CAP_BPF where the kernel asks for it on map lookups.
            assert!(CapabilitySet::BPF.contains(*kept), "{name}: {kept:?}");
        }
    }
    assert_eq!(walkers, 1, "{threads:?}");
}

/// What one process may do to a thread of another.
type Attempt = fn(i32) -> std::io::Result<()>;

/// What a process tries to read the memory of another. By thread, since the
/// kernel compares the capabilities of threads.
const ATTEMPTS: [(&str, Attempt); 4] = [
    ("open mem", |task| {
        let path = format!("/proc/{task}/mem");
        let open = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path);
        open.map(drop)
    }),
    ("process_vm_readv", |task| {
        let mut byte = 0u8;
        let local = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        // An address that nothing is at: EFAULT for who may read.
        let remote = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 1,
        };
        #[expect(unsafe_code, reason = "no wrapper")]
        // SAFETY: `local` is one byte of this function's.
        let read = unsafe { libc::process_vm_readv(task, &local, 1, &remote, 1, 0) };
        match std::io::Error::last_os_error() {
            error if read < 0 && error.raw_os_error() != Some(libc::EFAULT) => Err(error),
            _ => Ok(()),
        }
    }),
    ("ptrace", |task| {
        #[expect(unsafe_code, reason = "no wrapper")]
        // SAFETY: PTRACE_SEIZE touches no memory of the caller's.
        let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, task, 0, 0) };
        if seized < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    }),
    ("name a descriptor", |task| {
        std::fs::read_link(format!("/proc/{task}/fd/0")).map(drop)
    }),
];

/// Whether a process of this user without any capability succeeds.
fn attempt(user: u32, task: i32, what: Attempt) -> std::io::Result<()> {
    let mut command = Command::new("true");
    command.uid(user).gid(user);
    let inside = move || {
        rustix::thread::set_capabilities(
            None,
            rustix::thread::CapabilitySets {
                effective: CapabilitySet::empty(),
                permitted: CapabilitySet::empty(),
                inheritable: CapabilitySet::empty(),
            },
        )?;
        what(task)
    };
    #[expect(unsafe_code, reason = "the only way into a child of another user")]
    // SAFETY: nothing else of this process runs in the child; glibc's malloc,
    // which the path's text needs, works after fork (its atfork handlers).
    unsafe {
        command.pre_exec(inside);
    }
    assert!(command.spawn()?.wait()?.success());
    Ok(())
}

/// Checks that no process of this user without capabilities can open this one;
/// returns how many threads it has.
pub fn not_open(pid: u32, user: u32) -> usize {
    let mut tasks = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let task = task.unwrap().file_name().into_string().unwrap();
        for (what, attempted) in ATTEMPTS {
            let result = attempt(user, task.parse().unwrap(), attempted);
            let error = result.expect_err(what);
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error}");
        }
        tasks += 1;
    }
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max core file size"));
    let core: Vec<&str> = core.unwrap().split_whitespace().collect();
    assert_eq!(core[..2], ["0", "0"], "{limits}");
    tasks
}

fn cannot_be_opened(agent: &Agent, user: u32) {
    let pid = agent.pid();
    wait_until(|| threads(pid).iter().all(|(.., seccomp)| seccomp == "2"));
    assert!(not_open(pid, user) >= 4);
}

#[test]
fn a_process_of_the_same_user_cannot_open_the_agent() {
    if !runnable("opening the agent from a process of its user") {
        return;
    }
    let everyones = Everyones::new();
    let nobody = NOBODY.parse().unwrap();
    // The check below finds a process that can be opened.
    for user in [nobody, 0] {
        let mut sleeping = Command::new("setpriv");
        let user_id = user.to_string();
        sleeping.args(["--reuid", &user_id, "--regid", &user_id, "--clear-groups"]);
        sleeping.args(["--inh-caps=-all", "--bounding-set=-all", "sleep", "60"]);
        let mut sleeping = sleeping.spawn().unwrap();
        let task = sleeping.id().cast_signed();
        wait_until(|| {
            let name = std::fs::read_to_string(format!("/proc/{task}/comm"));
            name.is_ok_and(|name| name == "sleep\n")
        });
        for (what, attempted) in ATTEMPTS {
            attempt(user, task, attempted).expect(what);
        }
        sleeping.kill().unwrap();
        sleeping.wait().unwrap();
    }
    let agent = Agent::start(&["--filter.loopback", "include"]);
    cannot_be_opened(&agent, 0);
    let missed = "connmon_probe_missed_runs_total";
    let known = agent.scrape().has(missed);
    agent.stop();
    for set in ["", COUNT, NAMES, DIAG] {
        let agent = everyones.start(set, &["--proc.interval", "1s"]);
        cannot_be_opened(&agent, nobody);
        // It still reads its own values.
        let scrape = agent.scrape();
        for family in ["process_open_fds", "process_resident_memory_bytes"] {
            assert!(scrape.has(family), "{set}: {family}");
        }
        assert_eq!(scrape.has(missed), known && !set.is_empty(), "{set}");
        agent.stop();
    }
}

#[test]
fn namespaces_newer_than_the_sandbox_are_found() {
    if !runnable("a namespace made after the sandbox closed") {
        return;
    }
    let agent = Agent::start(&[
        "--filter.loopback",
        "include",
        "--reconcile.interval",
        "1s",
        "--log.level",
        "debug",
    ]);
    let before = access(&agent.scrape(), "diag");
    let world = World::new();
    // Audits are stretched on a busy machine, so that they stay cheap.
    let until = Instant::now() + Duration::from_secs(120);
    let found = |scrape: &Scrape| {
        access(scrape, "diag") > before
            && [&world.here, &world.there]
                .iter()
                .all(|service| owner_is(scrape, service.port(), &own_name()))
    };
    while !found(&agent.scrape()) {
        assert!(Instant::now() < until, "{}", agent.scrape().text);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(
        agent.scrape().connections(world.there.port(), "inbound"),
        1.0
    );
    agent.stop();
}

#[test]
fn strict_runs_on_a_kernel_with_every_measure() {
    if !runnable("--sandbox strict") {
        return;
    }
    let agent = Agent::start(&["--sandbox", "strict", "--filter.loopback", "include"]);
    counts_ten(&agent);
    agent.stop();
    let agent = Agent::start(&["--sandbox", "off", "--filter.loopback", "include"]);
    assert!(
        threads(agent.pid())
            .iter()
            .all(|(.., seccomp)| seccomp == "0")
    );
    agent.stop();
}
