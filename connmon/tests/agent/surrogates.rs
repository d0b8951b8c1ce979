//! The agent with less than root: other namespaces by `/proc/<pid>/net/tcp`,
//! told apart by that file's inode.

use std::path::PathBuf;
use std::process::Command;

use crate::harness::{Agent, Scrape};
use crate::held::Held;
use crate::support;

/// Below the ephemeral range, inside namespaces of our own.
const POLLED_PORT: u16 = 7003;
const TRACED_PORT: u16 = 7004;

#[test]
fn without_any_capability_it_polls_every_namespace() {
    if !may_run("polling without capabilities") {
        return;
    }
    let nobody = Nobody::new("polls", "");
    let mut held = hold(POLLED_PORT);
    let mut command = nobody.command();
    command.args(["--filter.loopback", "include", "--proc.interval", "200ms"]);
    command.args(["--ports.allow", &POLLED_PORT.to_string()]);
    let agent = Agent::spawn(command);
    let first = agent.scrape();
    assert_eq!(first.sum("connmon_source_info", &[("source", "proc")]), 1.0);
    assert_eq!(gauges(&first, POLLED_PORT), (60.0, 60.0), "{}", agent.log());
    assert!(namespaces(&first, "proc") >= 4.0);
    // One of the three ends.
    held.pop();
    agent.until("two namespaces", |scrape| {
        gauges(scrape, POLLED_PORT) == (40.0, 40.0)
    });
    held.extend([Held::start(POLLED_PORT, 5)]);
    held[2].wait();
    agent.until("a new one", |scrape| {
        gauges(scrape, POLLED_PORT) == (45.0, 45.0)
    });
    drop(held);
    agent.until("none", |scrape| gauges(scrape, POLLED_PORT) == (0.0, 0.0));
    agent.stop();
}

/// May load programs, but neither enter a namespace nor read its inode: the
/// rows of before start carry a surrogate id, the events do not.
#[test]
fn with_bpf_alone_seeds_of_other_namespaces_meet_their_events() {
    if !may_run("tracing with CAP_BPF and CAP_PERFMON alone") {
        return;
    }
    let nobody = Nobody::new("traces", "+bpf,+perfmon");
    let mut held = hold(TRACED_PORT);
    let mut command = nobody.command();
    command.args(["--source", "ebpf", "--filter.loopback", "include"]);
    command.args(["--reconcile.interval", "1s"]);
    command.args(["--ports.allow", &TRACED_PORT.to_string()]);
    let agent = Agent::spawn(command);
    let first = agent.scrape();
    let listeners = |scrape: &Scrape| {
        let port = TRACED_PORT.to_string();
        scrape.sum("connmon_listening_socket_info", &[("port", &port)])
    };
    assert_eq!(gauges(&first, TRACED_PORT), (60.0, 60.0), "{}", agent.log());
    assert_eq!(listeners(&first), 3.0);
    held.pop();
    agent.until("two namespaces", |scrape| {
        gauges(scrape, TRACED_PORT) == (40.0, 40.0)
    });
    held.extend([Held::start(TRACED_PORT, 5)]);
    held[2].wait();
    agent.until("a new one", |scrape| {
        gauges(scrape, TRACED_PORT) == (45.0, 45.0)
    });
    let audits =
        |scrape: &Scrape| scrape.sum("connmon_reconcile_runs_total", &[("trigger", "interval")]);
    // Removing takes two of them.
    let later = agent.until("two audits", |scrape| audits(scrape) >= 2.0);
    assert_eq!(gauges(&later, TRACED_PORT), (45.0, 45.0));
    agent.until("one listener a namespace", |scrape| {
        listeners(scrape) == 3.0
    });
    drop(held);
    agent.until("none", |scrape| {
        gauges(scrape, TRACED_PORT) == (0.0, 0.0) && listeners(scrape) == 0.0
    });
    let last = agent.scrape();
    let port = TRACED_PORT.to_string();
    let opened = last.sum("connmon_port_connections_opened_total", &[("port", &port)]);
    assert_eq!(opened, 10.0, "seeds are not opened, and nothing twice");
    agent.stop();
}

fn may_run(what: &str) -> bool {
    if !rustix::process::geteuid().is_root() {
        support::skipped(what, "needs root");
        return false;
    }
    if let Err(error) = Command::new("setpriv").arg("--version").output() {
        support::skipped(what, &format!("setpriv: {error}"));
        return false;
    }
    true
}

/// Three namespaces with twenty connections each.
fn hold(port: u16) -> Vec<Held> {
    let mut held: Vec<Held> = (0..3).map(|_| Held::start(port, 20)).collect();
    held.iter_mut().for_each(Held::wait);
    held
}

fn gauges(scrape: &Scrape, port: u16) -> (f64, f64) {
    (
        scrape.connections(port, "inbound"),
        scrape.connections(port, "outbound"),
    )
}

fn namespaces(scrape: &Scrape, access: &str) -> f64 {
    scrape.sum("connmon_network_namespaces", &[("access", access)])
}

/// The agent as uid 65534 with some capabilities.
pub struct Nobody {
    /// A copy: the tree under test may lie where nobody else may look.
    copy: PathBuf,
    capabilities: &'static str,
}

impl Nobody {
    pub fn new(name: &str, capabilities: &'static str) -> Self {
        let name = format!("connmon-{name}-{}", std::process::id());
        let copy = std::env::temp_dir().join(name);
        // Not by this process: whatever other tests fork meanwhile would have
        // it open for writing, and execve would refuse it.
        let copied = Command::new("cp")
            .arg(env!("CARGO_BIN_EXE_connmon"))
            .arg(&copy)
            .status()
            .unwrap();
        assert!(copied.success());
        Self { copy, capabilities }
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        command.arg("--no-new-privs");
        if !self.capabilities.is_empty() {
            for set in ["--inh-caps", "--ambient-caps"] {
                command.args([set, &format!("-all,{}", self.capabilities)]);
            }
        }
        command.arg(&self.copy);
        command
    }
}

impl Drop for Nobody {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.copy);
    }
}
