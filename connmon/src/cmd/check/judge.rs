//! Findings → lines. Pure.

use connmon_core::probe::{Method, Probe, Rung};
use connmon_core::scan::WalkSummary;
use connmon_host::kernel::{HostFacts, MOUNT_TRACEFS, OPEN_TRACEFS, Tracefs};

use super::{Findings, Line, NoTracing, Outcome, Tracing, features};

/// The lines of the answer, in order.
pub(super) fn judge(findings: &Findings) -> Vec<Line> {
    let mut lines = judge_host(&findings.facts, findings.tracing.is_ok());
    lines.extend(match &findings.tracing {
        Ok(tracing) => judge_tracing(findings, tracing),
        Err(none) => judge_no_tracing(findings, none),
    });
    match &findings.walk {
        Ok(summary) => {
            lines.push(judge_diag(findings, summary));
            lines.push(judge_namespaces(findings, summary));
        }
        // The agent does not run without the socket tables.
        Err(error) => lines.push(Line::failed("namespaces", error, "mount /proc")),
    }
    match &findings.strict {
        Some(Ok(())) => lines.push(Line::ok("sandbox", "strict: every measure is in force")),
        Some(Err(error)) => {
            let remedy = "use --sandbox auto, which runs with the measures that this kernel has";
            lines.push(Line::failed("sandbox", error, remedy));
        }
        None => {}
    }
    lines.push(match &findings.database {
        Ok(kind) => Line::ok("country database", kind),
        Err(error) => Line::failed(
            "country database",
            error,
            "correct --geoip.database, or the file that it names",
        ),
    });
    if let Err(error) = &findings.serving {
        lines.push(Line::failed(
            "serving",
            error,
            "correct the value, or provide what it names",
        ));
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
        let remedy = "run a newer kernel; until then /proc is polled";
        Line::degraded("kernel", format!("{kernel}, older than 5.8"), remedy)
    } else {
        Line::ok("kernel", kernel)
    });
    if facts.is_wsl2() {
        lines.push(Line::info(
            "wsl2",
            "only the sockets of WSL are seen, not those of Windows",
        ));
    }
    lines.push(if facts.btf {
        Line::ok("btf", "/sys/kernel/btf/vmlinux")
    } else {
        Line::degraded(
            "btf",
            "the kernel has no BTF: events carry no namespaces, cookies, errors and byte counts",
            "run a kernel with CONFIG_DEBUG_INFO_BTF",
        )
    });
    lines.push(match facts.lockdown.as_str() {
        "confidentiality" => Line::degraded(
            "lockdown",
            "confidentiality",
            "boot with lockdown=integrity or without",
        ),
        "" => Line::ok("lockdown", "none"),
        mode => Line::ok("lockdown", mode),
    });
    // Only one way to attach needs it, and has a line of its own.
    let without = |state| format!("{state}: the tracepoint method cannot be used");
    lines.push(match facts.tracefs {
        Tracefs::Mounted => Line::ok("tracefs", "mounted"),
        Tracefs::Closed => {
            let cause = without("not readable for this user");
            Line::new("tracefs", Outcome::Info, cause, OPEN_TRACEFS)
        }
        Tracefs::Absent => Line::new(
            "tracefs",
            Outcome::Info,
            without("not mounted"),
            MOUNT_TRACEFS,
        ),
    });
    lines
}

fn judge_tracing(findings: &Findings, tracing: &Tracing) -> Vec<Line> {
    let mut lines = vec![Line::ok(
        "ring buffer",
        format!("{} bytes", tracing.ring_bytes),
    )];
    lines.extend(
        tracing
            .rungs
            .iter()
            .map(|rung| judge_rung(&findings.facts, rung)),
    );
    if findings.config.traffic_interval.is_none() {
        lines.push(Line::info("traffic", "--traffic.interval is 0"));
    } else if !tracing.traffic {
        lines.push(Line::degraded(
            "traffic",
            "the tracepoint without BTF carries no byte counts: there are no metrics of bytes and retransmits",
            "run a kernel with CONFIG_DEBUG_INFO_BTF",
        ));
    }
    lines
}

/// Without eBPF the agent polls, or with `--source ebpf` does not run.
fn judge_no_tracing(findings: &Findings, none: &NoTracing) -> Vec<Line> {
    let (result, until) = match findings.ebpf_only() {
        true => (Outcome::Failed, ""),
        false if findings.polling() => (Outcome::Degraded, ""),
        false => (Outcome::Degraded, "; until then /proc is polled"),
    };
    let remedy = format!("{}{until}", none.remedy);
    let mut lines = vec![Line {
        failures: none.failures.clone(),
        ..Line::new("tracing", result, &none.cause, &remedy)
    }];
    let probes = Probe::ALL.map(|probe| format!("probe {}", probe.label()));
    for check in ["ring buffer".to_owned()].into_iter().chain(probes) {
        lines.push(Line::new(
            check,
            result,
            format!("none: {}", none.cause),
            &remedy,
        ));
    }
    if !findings.ebpf_only() {
        let cause = "polling: no bytes, retransmits, round-trip times, latencies, failures";
        lines.push(Line::degraded("traffic", cause, remedy));
    }
    lines
}

fn judge_rung(facts: &HostFacts, rung: &Rung) -> Line {
    let missing = match (rung.probe, rung.method) {
        (Probe::Accept, Method::None) => {
            Some("none: no accept waits, no names of processes that accept")
        }
        (Probe::Connect, Method::None) => {
            Some("none: latency of deferred Fast Open connects counts from connect()")
        }
        (Probe::SetState, Method::None) => Some("none"),
        (Probe::SetState, Method::Tracepoint) => Some("tracepoint, slower than tp_btf"),
        _ => None,
    };
    let mut cause = missing.unwrap_or(rung.method.label()).to_owned();
    if let Some(reason) = rung.reason() {
        cause += &format!(" ({reason})");
    }
    let check = format!("probe {}", rung.probe.label());
    let line = match missing {
        Some(_) => Line::degraded(check, cause, facts.remedy(rung)),
        None => Line::ok(check, cause),
    };
    let failures = rung.failures.clone();
    Line { failures, ..line }
}

fn namespaces(count: u32) -> String {
    let ending = if count == 1 { "" } else { "s" };
    format!("{count} namespace{ending}")
}

/// How the socket tables are read.
fn judge_diag(findings: &Findings, summary: &WalkSummary) -> Line {
    if findings.tracing.is_err() {
        Line::info("tcp_diag", "not tried: polling reads /proc/net/tcp")
    } else if summary.diag == 0 && summary.proc > 0 {
        let reason = reason(summary);
        let cause = format!(
            "sock_diag cannot be used ({reason}); /proc/net/tcp is read, slower and without bytes"
        );
        let remedy = "load tcp_diag and inet_diag on the host: modprobe tcp_diag";
        Line::degraded("tcp_diag", cause, remedy)
    } else {
        let cause = format!("{} read by sock_diag", namespaces(summary.diag));
        Line::ok("tcp_diag", cause)
    }
}

/// Which network namespaces are read.
fn judge_namespaces(findings: &Findings, summary: &WalkSummary) -> Line {
    let seen = format!("{} watched", namespaces(summary.diag + summary.proc));
    if findings.config.all_netns && !findings.facts.host_pids {
        let cause = format!("{seen}: this container has a pid namespace of its own");
        Line::degraded("namespaces", cause, "add --pid=host")
    } else if summary.unaudited > 0 || (summary.diag > 0 && summary.proc > 0) {
        let (proc, unread, reason) = (summary.proc, summary.unaudited, reason(summary));
        let cause = format!("{seen}, {proc} by /proc, {unread} more cannot be read ({reason})");
        Line::degraded(
            "namespaces",
            cause,
            "grant CAP_SYS_ADMIN and CAP_SYS_PTRACE",
        )
    } else {
        Line::ok("namespaces", seen)
    }
}

fn reason(summary: &WalkSummary) -> &str {
    summary.reason.as_deref().unwrap_or("reason unknown")
}
