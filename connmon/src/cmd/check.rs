//! `connmon check`: what works on this host. Each thing is tried as the agent
//! would use it; whatever it attaches is detached again when it ends.

mod features;
mod judge;

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use connmon_core::geo::Database;
use connmon_core::probe::{AttachFailure, Rung};
use connmon_core::scan::{Trigger, Walk, WalkMessage, WalkSummary};
use connmon_host::kernel::{HostFacts, Tracer, TracerOptions};
use connmon_host::reconcile::{Walker, WalkerOptions};
use connmon_host::sandbox::{Role, SandboxChoice};
use serde::Serialize;

use crate::cli::Output;
use crate::config::{Config, SourceChoice, check_serving};
use crate::database;

/// Exit code of a host where the agent runs with less than it could.
const DEGRADED: u8 = 3;

/// How a line turned out, worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    /// For information; does not count.
    Info,
    /// Works.
    Ok,
    /// The agent runs without it.
    Degraded,
    /// The agent cannot run.
    Failed,
}

/// One line of the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Line {
    check: String,
    result: Outcome,
    /// What was found, or why it is not better.
    cause: String,
    /// What helps; empty when nothing is needed.
    remedy: String,
    /// What the kernel refused, best method first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    failures: Vec<AttachFailure>,
}

impl Line {
    fn new(
        check: impl Into<String>,
        result: Outcome,
        cause: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            check: check.into(),
            result,
            cause: cause.into(),
            remedy: remedy.into(),
            failures: Vec::new(),
        }
    }

    fn info(check: impl Into<String>, cause: impl Into<String>) -> Self {
        Self::new(check, Outcome::Info, cause, "")
    }

    fn ok(check: impl Into<String>, cause: impl Into<String>) -> Self {
        Self::new(check, Outcome::Ok, cause, "")
    }

    fn degraded(
        check: impl Into<String>,
        cause: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::new(check, Outcome::Degraded, cause, remedy)
    }

    fn failed(
        check: impl Into<String>,
        cause: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::new(check, Outcome::Failed, cause, remedy)
    }
}

/// What was tried, and how it went.
struct Findings {
    config: Config,
    facts: HostFacts,
    /// Whether a `--web.listen-address` has a port that needs a capability.
    low_port: bool,
    tracing: Result<Tracing, NoTracing>,
    walk: Result<WalkSummary, String>,
    /// Whether every thread could enter its sandbox, with `--sandbox strict`.
    strict: Option<Result<(), String>>,
    /// Type of the country database, or why it cannot be used.
    database: Result<String, String>,
    /// Why the web configuration or an address to listen on cannot be used.
    serving: Result<(), String>,
}

impl Findings {
    /// Whether `--source proc` asks for polling.
    fn polling(&self) -> bool {
        self.config.source == SourceChoice::Proc
    }

    /// Whether `--source ebpf` forbids polling.
    fn ebpf_only(&self) -> bool {
        self.config.source == SourceChoice::Ebpf
    }
}

/// What is attached.
struct Tracing {
    rungs: Vec<Rung>,
    ring_bytes: u32,
    /// Whether events carry byte counts.
    traffic: bool,
}

/// Why nothing is traced, and what helps.
struct NoTracing {
    cause: String,
    remedy: String,
    failures: Vec<AttachFailure>,
}

/// Prints one line for each thing that was tried. Exit code 0: full eBPF; 3:
/// the agent runs, degraded; 1: it cannot run.
///
/// # Errors
/// When the output cannot be written, except to a closed pipe.
pub fn run(config: &Config, output: Output) -> anyhow::Result<ExitCode> {
    let lines = judge::judge(&find(config));
    Ok(answer(&mut io::stdout().lock(), output, &lines)?)
}

/// Prints the lines. The exit code holds also where nobody reads them.
fn answer(out: &mut impl Write, output: Output, lines: &[Line]) -> io::Result<ExitCode> {
    let worst = lines.iter().map(|line| line.result).max();
    let (code, verdict) = match worst {
        Some(Outcome::Failed) => (ExitCode::FAILURE, "connmon cannot run here"),
        Some(Outcome::Degraded) => (ExitCode::from(DEGRADED), "connmon runs here, degraded"),
        _ => (ExitCode::SUCCESS, "connmon runs here in full"),
    };
    match print(out, output, lines, verdict) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
        _ => Ok(code),
    }
}

fn print(out: &mut impl Write, output: Output, lines: &[Line], verdict: &str) -> io::Result<()> {
    for line in lines {
        if output == Output::Json {
            super::print_json(out, line)?;
            continue;
        }
        let result = format!("{:?}", line.result).to_lowercase();
        writeln!(out, "{result:<9} {}: {}", line.check, line.cause)?;
        if !line.remedy.is_empty() {
            writeln!(out, "          → {}", line.remedy)?;
        }
    }
    if output == Output::Table {
        writeln!(out, "{verdict}")?;
    }
    out.flush()
}

fn find(config: &Config) -> Findings {
    let tracing = trace(config);
    let database = match &config.geoip_database {
        Some(path) => database::open(path).map_err(|error| error.to_string()),
        None => Database::embedded().map_err(|error| error.to_string()),
    };
    let first_free_port = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let first_free_port = first_free_port
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let mut ports = config.listen.iter().map(|listen| listen.port);
    Findings {
        facts: HostFacts::read(),
        low_port: ports.any(|port| port != 0 && port < first_free_port.unwrap_or(1024)),
        walk: walk(config, tracing.is_err()),
        strict: (config.sandbox == SandboxChoice::Strict).then(|| enter_sandboxes(config)),
        tracing,
        database: database.map(|database| database.database_type().to_owned()),
        serving: check_serving(config).map_err(|error| error.to_string()),
        config: config.clone(),
    }
}

/// Attaches as the agent would, and detaches at once.
fn trace(config: &Config) -> Result<Tracing, NoTracing> {
    let no_tracing = |cause: String, remedy: &str| NoTracing {
        cause,
        remedy: remedy.to_owned(),
        failures: Vec::new(),
    };
    if config.source == SourceChoice::Proc {
        return Err(no_tracing(
            "--source proc: /proc is polled".to_owned(),
            "leave --source at auto",
        ));
    }
    let options = super::tracer_options(config).map_err(|error| {
        no_tracing(
            format!("/proc/self/ns/net cannot be read: {error}"),
            "mount /proc",
        )
    })?;
    let tracer = Tracer::attach(&TracerOptions {
        owners: false,
        traffic: config.traffic_interval.is_some(),
        log_level: log::LevelFilter::Off,
        ..options
    })
    .map_err(|error| NoTracing {
        cause: error.diagnosis.cause,
        remedy: error.diagnosis.remedy,
        failures: error.failures,
    })?;
    Ok(Tracing {
        rungs: tracer.rungs().to_vec(),
        ring_bytes: tracer.ring_len(),
        traffic: tracer.traffic_known(),
    })
}

/// Has a thread enter each sandbox of the agent with `--sandbox strict`.
fn enter_sandboxes(config: &Config) -> Result<(), String> {
    let plan = config.sandbox_plan();
    for role in [Role::Walker, Role::Fold, Role::Serve] {
        std::thread::scope(|scope| scope.spawn(|| plan.enter(role)).join())
            .map_err(|_| "bug: entering the sandbox panicked".to_owned())?
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Reads the socket tables of all namespaces once, as the agent does.
fn walk(config: &Config, polling: bool) -> Result<WalkSummary, String> {
    let options = WalkerOptions {
        all_netns: config.all_netns,
        listeners: config.listeners,
        force_proc: polling,
        ..WalkerOptions::default()
    };
    let (walker, mut messages) = Walker::spawn(options).map_err(|error| error.to_string())?;
    let requested = walker.request(Walk {
        trigger: Trigger::Interval,
        traffic: false,
        audit: true,
    });
    requested.map_err(|error| format!("bug: the socket tables cannot be requested: {error:?}"))?;
    while let Some(message) = messages.blocking_next() {
        if let WalkMessage::End(summary) = message {
            return Ok(summary);
        }
    }
    Err("bug: the thread that reads the socket tables ended early".into())
}

#[cfg(test)]
mod tests;
