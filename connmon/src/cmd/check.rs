//! `connmon check`: what works on this host, tried for real. Whatever it
//! attaches is gone when it ends.

mod features;

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use connmon_core::geo::Database;
use connmon_core::probe::{AttachFailure, Method, Probe, Rung};
use connmon_core::scan::{Trigger, Walk, WalkMessage, WalkSummary};
use connmon_host::kernel::{
    HostFacts, MOUNT_TRACEFS, OPEN_TRACEFS, Tracefs, Tracer, TracerOptions,
};
use connmon_host::reconcile::{Walker, WalkerOptions};
use connmon_host::sandbox::Role;
use connmon_host::sandbox::SandboxChoice;
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
    /// Said for information; does not count.
    Info,
    /// Works.
    Ok,
    /// The agent runs without it.
    Degraded,
    /// The agent cannot run.
    Failed,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
        }
    }
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

fn line(
    check: impl Into<String>,
    result: Outcome,
    cause: impl Into<String>,
    remedy: impl Into<String>,
) -> Line {
    Line {
        check: check.into(),
        result,
        cause: cause.into(),
        remedy: remedy.into(),
        failures: Vec::new(),
    }
}

/// What was tried.
struct Findings {
    facts: HostFacts,
    asked: Asked,
    /// Rungs, ring size and whether traffic is known; or why there is none.
    tracing: Result<Tracing, NoTracing>,
    walk: Result<WalkSummary, String>,
    /// Whether every room could be closed, where that was asked for.
    strict: Option<Result<(), String>>,
    /// Type of the country database, or what is wrong with it.
    database: Result<String, String>,
    /// Why the web configuration or an address to listen on cannot be used.
    serving: Result<(), String>,
}

/// What the configuration asks of the host.
#[derive(Clone, Debug)]
struct Asked {
    /// `--source proc`.
    polling: bool,
    /// `--source ebpf`: no falling back.
    ebpf_only: bool,
    all_netns: bool,
    listeners: bool,
    /// `--traffic.interval` is not 0.
    traffic: bool,
    /// `--ebpf.stats`.
    stats: bool,
    /// A `--web.listen-address` with a port that needs a capability.
    low_port: bool,
}

impl Asked {
    fn of(config: &Config) -> Self {
        let unprivileged = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(1024);
        let mut ports = config.listen.iter().map(|listen| listen.port);
        Self {
            polling: config.source == SourceChoice::Proc,
            ebpf_only: config.source == SourceChoice::Ebpf,
            all_netns: config.all_netns,
            listeners: config.listeners,
            traffic: config.traffic_interval.is_some(),
            stats: config.bpf_stats,
            low_port: ports.any(|port| port != 0 && port < unprivileged),
        }
    }
}

struct Tracing {
    rungs: Vec<Rung>,
    ring_bytes: u32,
    traffic: bool,
}

/// Why nothing is traced, and what helps.
struct NoTracing {
    cause: String,
    remedy: String,
    failures: Vec<AttachFailure>,
}

impl NoTracing {
    /// The agent polls then, or does not run.
    fn new(cause: &str, remedy: &str, polls: bool) -> Self {
        let until = if polls {
            "; until then /proc is polled"
        } else {
            ""
        };
        Self {
            cause: cause.to_owned(),
            remedy: format!("{remedy}{until}"),
            failures: Vec::new(),
        }
    }

    fn asked_for() -> Self {
        Self {
            cause: "--source proc: /proc is polled".to_owned(),
            remedy: "leave --source at auto".to_owned(),
            failures: Vec::new(),
        }
    }
}

/// Prints one line for each thing that was tried. Exit code 0: full eBPF; 3:
/// the agent runs, degraded; 1: it cannot run.
///
/// # Errors
/// When the output cannot be written, other than for want of a reader.
pub fn run(config: &Config, output: Output) -> anyhow::Result<ExitCode> {
    let lines = judge(&find(config));
    Ok(answer(&mut io::stdout().lock(), output, &lines)?)
}

/// Prints the lines. The exit code answers too, and whoever asks for it alone
/// need not read them.
fn answer(out: &mut impl Write, output: Output, lines: &[Line]) -> io::Result<ExitCode> {
    match print(out, output, lines) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
        _ => Ok(exit_code(lines)),
    }
}

fn print(out: &mut impl Write, output: Output, lines: &[Line]) -> io::Result<()> {
    match output {
        Output::Table => table(out, lines)?,
        Output::Json => {
            for line in lines {
                serde_json::to_writer(&mut *out, line)?;
                writeln!(out)?;
            }
        }
    }
    out.flush()
}

fn find(config: &Config) -> Findings {
    let asked = Asked::of(config);
    let tracing = trace(config, &asked);
    let database = match &config.geoip_database {
        Some(path) => database::open(path).map_err(|error| error.to_string()),
        None => Database::embedded().map_err(|error| error.to_string()),
    };
    Findings {
        facts: HostFacts::read(),
        walk: walk(&asked, tracing.is_err()),
        strict: (config.sandbox == SandboxChoice::Strict).then(|| close(config)),
        asked,
        tracing,
        database: database
            .map(|database| database.database_type().to_owned())
            .map_err(|error| error.to_string()),
        serving: check_serving(config).map_err(|error| error.to_string()),
    }
}

/// Attaches as the agent would. Dropped at once: nothing stays attached.
fn trace(config: &Config, asked: &Asked) -> Result<Tracing, NoTracing> {
    if asked.polling {
        return Err(NoTracing::asked_for());
    }
    let polls = !asked.ebpf_only;
    let options = super::tracer_options(config).map_err(|error| {
        let cause = format!("/proc/self/ns/net cannot be read: {error}");
        NoTracing::new(&cause, "mount /proc", polls)
    })?;
    let tracer = Tracer::attach(&TracerOptions {
        owners: false,
        traffic: asked.traffic,
        log_level: log::LevelFilter::Off,
        ..options
    })
    .map_err(|error| NoTracing {
        failures: error.failures,
        ..NoTracing::new(&error.diagnosis.cause, &error.diagnosis.remedy, polls)
    })?;
    Ok(Tracing {
        rungs: tracer.rungs().to_vec(),
        ring_bytes: tracer.ring_len(),
        traffic: tracer.traffic_known(),
    })
}

/// Closes a thread in for each room, as the agent does with `--sandbox
/// strict`.
fn close(config: &Config) -> Result<(), String> {
    let plan = config.sandbox_plan();
    for role in [Role::Walker, Role::Fold, Role::Serve] {
        std::thread::scope(|scope| scope.spawn(|| plan.enter(role)).join())
            .map_err(|_| "bug: closing in panicked".to_owned())?
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// One walk over the namespaces, as the agent does it.
fn walk(asked: &Asked, polling: bool) -> Result<WalkSummary, String> {
    let options = WalkerOptions {
        all_netns: asked.all_netns,
        listeners: asked.listeners,
        force_proc: polling,
        ..WalkerOptions::default()
    };
    let (walker, mut messages) = Walker::spawn(options).map_err(|error| error.to_string())?;
    let asked = walker.request(Walk {
        trigger: Trigger::Interval,
        traffic: false,
        audit: true,
    });
    asked.map_err(|error| format!("the walker refused: {error:?}"))?;
    while let Some(message) = messages.blocking_next() {
        if let WalkMessage::End(summary) = message {
            return Ok(summary);
        }
    }
    Err("the walk ended early".into())
}

/// Findings → lines. Pure.
fn judge(findings: &Findings) -> Vec<Line> {
    let mut lines = judge_host(&findings.facts, findings.tracing.is_ok());
    lines.extend(match &findings.tracing {
        Ok(tracing) => judge_tracing(findings, tracing),
        Err(none) => judge_no_tracing(findings, none),
    });
    match &findings.walk {
        Ok(summary) => lines.extend(judge_walk(findings, summary)),
        // Nothing runs without the walker.
        Err(error) => lines.push(line("namespaces", Outcome::Failed, error, "mount /proc")),
    }
    lines.extend(findings.strict.as_ref().map(|strict| match strict {
        Ok(()) => line(
            "sandbox",
            Outcome::Ok,
            "strict: every measure is in force",
            "",
        ),
        Err(error) => {
            let remedy = "--sandbox auto runs with the measures that this kernel has";
            line("sandbox", Outcome::Failed, error, remedy)
        }
    }));
    lines.push(match &findings.database {
        Ok(kind) => line("country database", Outcome::Ok, kind, ""),
        Err(error) => {
            let remedy = "check --geoip.database";
            line("country database", Outcome::Failed, error, remedy)
        }
    });
    if let Err(error) = &findings.serving {
        let remedy = "correct the value, or provide what it names";
        lines.push(line("serving", Outcome::Failed, error, remedy));
    }
    lines.extend(features::judge(findings));
    lines
}

/// What the kernel and its file systems offer.
fn judge_host(facts: &HostFacts, traced: bool) -> Vec<Line> {
    let mut lines = Vec::new();
    let kernel = format!("Linux {}", facts.release);
    // Some distributions took the ring buffer over to older kernels.
    lines.push(if facts.version() < (5, 8) && !traced {
        let cause = format!("{kernel}, older than 5.8");
        let remedy = "run a newer kernel; until then /proc is polled";
        line("kernel", Outcome::Degraded, cause, remedy)
    } else {
        line("kernel", Outcome::Ok, kernel, "")
    });
    if facts.is_wsl2() {
        let cause = "WSL's sockets are seen, not Windows'";
        lines.push(line("wsl2", Outcome::Info, cause, ""));
    }
    lines.push(if facts.btf {
        line("btf", Outcome::Ok, "/sys/kernel/btf/vmlinux", "")
    } else {
        let cause =
            "the kernel shows no BTF: events have no namespaces, cookies, errors and byte counts";
        let remedy = "run a kernel with CONFIG_DEBUG_INFO_BTF";
        line("btf", Outcome::Degraded, cause, remedy)
    });
    lines.push(match facts.lockdown.as_str() {
        "" => line("lockdown", Outcome::Ok, "none", ""),
        "confidentiality" => {
            let remedy = "boot with lockdown=integrity or without";
            line("lockdown", Outcome::Degraded, "confidentiality", remedy)
        }
        mode => line("lockdown", Outcome::Ok, mode, ""),
    });
    // Needed by one rung only, whose own line counts.
    let unused = |state| format!("{state}: the tracepoint rung cannot be used");
    lines.push(match facts.tracefs {
        Tracefs::Mounted => line("tracefs", Outcome::Ok, "mounted", ""),
        Tracefs::Closed => {
            let cause = unused("closed to this user");
            line("tracefs", Outcome::Info, cause, OPEN_TRACEFS)
        }
        Tracefs::Absent => {
            let cause = unused("not mounted");
            line("tracefs", Outcome::Info, cause, MOUNT_TRACEFS)
        }
    });
    lines
}

fn judge_tracing(findings: &Findings, tracing: &Tracing) -> Vec<Line> {
    let ring = format!("{} bytes", tracing.ring_bytes);
    let mut lines = vec![line("ring buffer", Outcome::Ok, ring, "")];
    lines.extend((tracing.rungs.iter()).map(|rung| judge_rung(&findings.facts, rung)));
    if !findings.asked.traffic {
        let cause = "--traffic.interval is 0";
        lines.push(line("traffic", Outcome::Info, cause, ""));
    } else if !tracing.traffic {
        let cause = "the tracepoint without BTF carries no bytes: those families are absent";
        let remedy = "run a kernel with BTF";
        lines.push(line("traffic", Outcome::Degraded, cause, remedy));
    }
    lines
}

fn judge_no_tracing(findings: &Findings, none: &NoTracing) -> Vec<Line> {
    let ebpf_only = findings.asked.ebpf_only;
    let result = if ebpf_only {
        Outcome::Failed
    } else {
        Outcome::Degraded
    };
    let remedy = &none.remedy;
    let mut lines = vec![Line {
        failures: none.failures.clone(),
        ..line("tracing", result, &none.cause, remedy)
    }];
    let probes = Probe::ALL.map(|probe| format!("probe {}", probe.label()));
    let cause = format!("none: {}", none.cause);
    for check in ["ring buffer".to_owned()].into_iter().chain(probes) {
        lines.push(line(check, result, &cause, remedy));
    }
    if !ebpf_only {
        let cause = "polling: no bytes, retransmits, round-trip times, latencies, failures";
        lines.push(line("traffic", Outcome::Degraded, cause, remedy));
    }
    lines
}

fn judge_rung(facts: &HostFacts, rung: &Rung) -> Line {
    let why = |text: &str| match rung.reason() {
        Some(reason) => format!("{text} ({reason})"),
        None => text.to_owned(),
    };
    let (result, cause) = match (rung.probe, rung.method) {
        (probe, Method::None) => {
            let lost = match probe {
                Probe::Accept => "none: no accept waits, no names of processes that accept",
                Probe::Connect => {
                    "none: latency of deferred Fast Open connects counts from connect()"
                }
                Probe::SetState => "none",
            };
            (Outcome::Degraded, why(lost))
        }
        (Probe::SetState, Method::Tracepoint) => {
            (Outcome::Degraded, why("tracepoint, slower than tp_btf"))
        }
        (_, method) => (Outcome::Ok, why(method.label())),
    };
    let remedy = match result {
        Outcome::Degraded => facts.remedy(rung),
        _ => "",
    };
    Line {
        failures: rung.failures.clone(),
        ..line(
            format!("probe {}", rung.probe.label()),
            result,
            cause,
            remedy,
        )
    }
}

fn namespaces(count: u32) -> String {
    let ending = if count == 1 { "" } else { "s" };
    format!("{count} namespace{ending}")
}

fn judge_walk(findings: &Findings, summary: &WalkSummary) -> Vec<Line> {
    let mut lines = Vec::new();
    let reason = summary.reason.as_deref().unwrap_or("not said");
    let watched = summary.diag + summary.proc;
    if findings.tracing.is_err() {
        let cause = "not asked: polling reads /proc/net/tcp".to_owned();
        lines.push(line("tcp_diag", Outcome::Info, cause, ""));
    } else if summary.diag == 0 && summary.proc > 0 {
        lines.push(line(
            "tcp_diag",
            Outcome::Degraded,
            format!("sock_diag cannot be used ({reason}); /proc/net/tcp is read, slower and without bytes"),
            "load tcp_diag and inet_diag on the host: modprobe tcp_diag",
        ));
    } else {
        let cause = format!("{} read by sock_diag", namespaces(summary.diag));
        lines.push(line("tcp_diag", Outcome::Ok, cause, ""));
    }
    let seen = format!("{} watched", namespaces(watched));
    if findings.asked.all_netns && !findings.facts.host_pids {
        lines.push(line(
            "namespaces",
            Outcome::Degraded,
            format!("{seen}: this container has a pid namespace of its own"),
            "add --pid=host",
        ));
    } else if summary.unaudited > 0 || (summary.diag > 0 && summary.proc > 0) {
        lines.push(line(
            "namespaces",
            Outcome::Degraded,
            format!(
                "{seen}, {} by /proc, {} more cannot be read ({reason})",
                summary.proc, summary.unaudited
            ),
            "grant CAP_SYS_ADMIN and CAP_SYS_PTRACE",
        ));
    } else {
        lines.push(line("namespaces", Outcome::Ok, seen, ""));
    }
    lines
}

fn exit_code(lines: &[Line]) -> ExitCode {
    match lines.iter().map(|line| line.result).max() {
        Some(Outcome::Failed) => ExitCode::FAILURE,
        Some(Outcome::Degraded) => ExitCode::from(DEGRADED),
        _ => ExitCode::SUCCESS,
    }
}

fn table(out: &mut impl Write, lines: &[Line]) -> io::Result<()> {
    for line in lines {
        writeln!(
            out,
            "{:<9} {}: {}",
            line.result.label(),
            line.check,
            line.cause
        )?;
        if !line.remedy.is_empty() {
            writeln!(out, "          → {}", line.remedy)?;
        }
    }
    let verdict = match lines.iter().map(|line| line.result).max() {
        Some(Outcome::Failed) => "connmon cannot run here",
        Some(Outcome::Degraded) => "connmon runs here, degraded",
        _ => "connmon runs here in full",
    };
    writeln!(out, "{verdict}")
}

#[cfg(test)]
mod tests;
