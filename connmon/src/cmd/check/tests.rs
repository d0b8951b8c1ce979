use connmon_core::probe::{Method, Probe, Stage};
use connmon_host::kernel::Tracefs;
use connmon_host::sandbox::{self, CapabilitySet};

use super::judge::judge;
use super::*;

fn rung(probe: Probe, method: Method, failures: &[AttachFailure]) -> Rung {
    Rung {
        probe,
        method,
        failures: failures.to_vec(),
    }
}

fn failure(method: Method, stage: Stage, errno: i32) -> AttachFailure {
    AttachFailure {
        errno: Some(errno),
        ..AttachFailure::new(method, stage, format!("os error {errno}"))
    }
}

pub(super) fn good() -> Findings {
    Findings {
        facts: HostFacts {
            release: "6.12.107+deb13-cloud-amd64".into(),
            btf: true,
            lockdown: "none".into(),
            capabilities: CapabilitySet::all(),
            seccomp: false,
            memlock_bytes: None,
            selinux: false,
            host_users: true,
            host_pids: true,
            tracefs: Tracefs::Mounted,
        },
        tracing: Ok(Tracing {
            rungs: vec![
                rung(Probe::SetState, Method::TpBtf, &[]),
                rung(Probe::Connect, Method::Fentry, &[]),
                rung(Probe::Accept, Method::Fexit, &[]),
            ],
            ring_bytes: 8 << 20,
            traffic: true,
        }),
        walk: Ok(WalkSummary {
            diag: 3,
            ..WalkSummary::default()
        }),
        strict: None,
        database: Ok("DBIP-Country-Lite".into()),
        serving: Ok(()),
        config: crate::config::load::<&str>(&[], []).unwrap().config,
        low_port: false,
    }
}

pub(super) fn no_tracing() -> NoTracing {
    NoTracing {
        cause: "missing capability CAP_BPF".into(),
        remedy: "run as root".into(),
        failures: Vec::new(),
    }
}

fn exit_code(lines: &[Line]) -> ExitCode {
    answer(&mut Vec::new(), Output::Table, lines).unwrap()
}

pub(super) fn find<'a>(lines: &'a [Line], check: &str) -> &'a Line {
    lines.iter().find(|line| line.check == check).unwrap()
}

#[test]
fn a_full_host_exits_0() {
    let lines = judge(&good());
    assert_eq!(exit_code(&lines), ExitCode::SUCCESS, "{lines:#?}");
    assert!(lines.iter().all(|line| line.result <= Outcome::Ok));
    let features = lines
        .iter()
        .filter(|line| line.check.starts_with("feature: "));
    assert_eq!(features.count(), sandbox::FEATURES.len());
}

#[test]
fn a_refused_state_program_asks_for_a_report() {
    let failures = [failure(Method::TpBtf, Stage::Load, 22)];
    let mut findings = good();
    findings.tracing.as_mut().ok().unwrap().rungs[0] =
        rung(Probe::SetState, Method::Tracepoint, &failures);
    let lines = judge(&findings);
    let line = find(&lines, "probe inet_sock_set_state");
    assert_eq!(line.result, Outcome::Degraded);
    assert!(line.remedy.contains("report"), "{line:?}");
}

#[test]
fn refused_trampolines_without_kprobes_are_degraded() {
    let failures = [
        failure(Method::Fexit, Stage::Load, 1),
        failure(Method::Kretprobe, Stage::Attach, 2),
    ];
    let mut findings = good();
    findings.tracing.as_mut().ok().unwrap().rungs[2] = rung(Probe::Accept, Method::None, &failures);
    let lines = judge(&findings);
    let line = find(&lines, "probe inet_csk_accept");
    assert_eq!(line.result, Outcome::Degraded);
    assert!(line.remedy.contains("refuses trampolines"), "{line:?}");
    assert_eq!(exit_code(&lines), ExitCode::from(DEGRADED));
    // A kprobe instead is no loss.
    findings.tracing.as_mut().ok().unwrap().rungs[2] =
        rung(Probe::Accept, Method::Kretprobe, &failures);
    assert_eq!(exit_code(&judge(&findings)), ExitCode::SUCCESS);
}

#[test]
fn a_container_without_the_hosts_pids_is_degraded() {
    let mut findings = good();
    findings.facts.host_pids = false;
    findings.walk = Ok(WalkSummary {
        diag: 1,
        ..WalkSummary::default()
    });
    let lines = judge(&findings);
    let line = find(&lines, "namespaces");
    assert!(line.cause.starts_with("1 namespace watched"), "{line:?}");
    assert_eq!(line.remedy, "add --pid=host");
}

/// What goes with tracing.
const TRACED: [&str; 5] = [
    "tracing",
    "ring buffer",
    "probe inet_sock_set_state",
    "probe tcp_connect",
    "probe inet_csk_accept",
];

#[test]
fn no_tracing_polls_or_fails() {
    let mut findings = good();
    findings.tracing = Err(no_tracing());
    let lines = judge(&findings);
    for check in TRACED {
        let line = find(&lines, check);
        assert_eq!(line.result, Outcome::Degraded, "{check}");
        assert!(
            line.cause.ends_with("missing capability CAP_BPF"),
            "{line:?}"
        );
        assert!(
            line.remedy.starts_with("run as root; until then"),
            "{line:?}"
        );
    }
    assert!(
        find(&lines, "traffic")
            .cause
            .starts_with("polling: no bytes")
    );
    assert_eq!(exit_code(&lines), ExitCode::from(DEGRADED));
    findings.config.source = SourceChoice::Ebpf;
    let lines = judge(&findings);
    for check in TRACED {
        let line = find(&lines, check);
        assert_eq!(
            (line.result, line.remedy.as_str()),
            (Outcome::Failed, "run as root")
        );
    }
    assert!(lines.iter().all(|line| line.check != "traffic"));
    assert_eq!(exit_code(&lines), ExitCode::FAILURE);
    findings.config.source = SourceChoice::Auto;
    findings.walk = Err("no /proc".into());
    assert_eq!(exit_code(&judge(&findings)), ExitCode::FAILURE);
}

/// Each of these ends the agent, however well it could trace.
#[test]
fn no_socket_tables_or_strict_sandbox_is_failed() {
    let mut findings = good();
    findings.walk = Err("no /proc".into());
    assert_eq!(exit_code(&judge(&findings)), ExitCode::FAILURE);

    let mut findings = good();
    assert!(judge(&findings).iter().all(|line| line.check != "sandbox"));
    for (strict, result) in [
        (Ok(()), Outcome::Ok),
        (Err("no Landlock".to_owned()), Outcome::Failed),
    ] {
        findings.strict = Some(strict);
        let lines = judge(&findings);
        assert_eq!(find(&lines, "sandbox").result, result);
        let fails = exit_code(&lines) == ExitCode::FAILURE;
        assert_eq!(fails, result == Outcome::Failed);
    }
}

#[test]
fn source_proc_is_degraded_with_what_it_lacks() {
    let mut findings = good();
    findings.config.source = SourceChoice::Proc;
    findings.tracing = trace(&findings.config);
    findings.walk = Ok(WalkSummary {
        proc: 3,
        ..WalkSummary::default()
    });
    let lines = judge(&findings);
    for check in TRACED.into_iter().chain(["traffic"]) {
        let line = find(&lines, check);
        assert_eq!(line.result, Outcome::Degraded, "{check}");
        assert_eq!(line.remedy, "leave --source at auto", "{check}");
    }
    // Not wanting it, polling misses neither it nor sock_diag.
    assert_eq!(find(&lines, "tcp_diag").result, Outcome::Info);
    assert_eq!(find(&lines, "namespaces").cause, "3 namespaces watched");
    assert_eq!(exit_code(&lines), ExitCode::from(DEGRADED));
}

#[test]
fn traffic_that_is_switched_off_is_not_missed() {
    let mut findings = good();
    findings.config.traffic_interval = None;
    findings.tracing.as_mut().ok().unwrap().traffic = false;
    let lines = judge(&findings);
    assert_eq!(find(&lines, "traffic").result, Outcome::Info);
    assert_eq!(exit_code(&lines), ExitCode::SUCCESS);
}

#[test]
fn what_else_lacks_is_said() {
    let mut findings = good();
    findings.facts.btf = false;
    findings.facts.release = "5.15.167.4-microsoft-standard-WSL2".into();
    findings.facts.lockdown = "confidentiality".into();
    findings.facts.tracefs = Tracefs::Absent;
    findings.tracing.as_mut().ok().unwrap().traffic = false;
    findings.walk = Ok(WalkSummary {
        proc: 2,
        reason: Some("sock_diag: No such file or directory".into()),
        ..WalkSummary::default()
    });
    findings.database = Err("/x.mmdb: invalid".into());
    let lines = judge(&findings);
    assert_eq!(
        find(&lines, "wsl2").cause,
        "only the sockets of WSL are seen, not those of Windows"
    );
    for check in ["btf", "lockdown", "traffic", "tcp_diag"] {
        assert_eq!(find(&lines, check).result, Outcome::Degraded, "{check}");
        assert!(!find(&lines, check).remedy.is_empty(), "{check}");
    }
    assert!(
        find(&lines, "tracefs")
            .remedy
            .starts_with("mount -t tracefs")
    );
    assert_eq!(find(&lines, "country database").result, Outcome::Failed);
    assert_eq!(exit_code(&lines), ExitCode::FAILURE);
}

/// What cannot be written to, and why.
struct Unwritable(ErrorKind);

impl Write for Unwritable {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(self.0.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(self.0.into())
    }
}

#[test]
fn the_verdict_is_the_exit_code_whoever_reads() {
    let full = judge(&good());
    let mut findings = good();
    findings.facts.btf = false;
    let degraded = judge(&findings);
    findings.database = Err("/x.mmdb: invalid".into());
    let failed = judge(&findings);
    for output in [Output::Table, Output::Json] {
        for (lines, code) in [
            (&full, ExitCode::SUCCESS),
            (&degraded, ExitCode::from(DEGRADED)),
            (&failed, ExitCode::FAILURE),
        ] {
            let gone = answer(&mut Unwritable(ErrorKind::BrokenPipe), output, lines);
            assert_eq!(gone.unwrap(), code, "{output:?}");
            let lost = answer(&mut Unwritable(ErrorKind::StorageFull), output, lines);
            assert_eq!(lost.unwrap_err().kind(), ErrorKind::StorageFull);
        }
    }
}

#[test]
fn both_outputs_hold_every_line() {
    let lines = judge(&good());
    let mut text = Vec::new();
    answer(&mut text, Output::Table, &lines).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert!(lines.iter().all(|line| text.contains(&line.check)));
    assert!(text.ends_with("connmon runs here in full\n"));
    let json = serde_json::to_value(&lines[0]).unwrap();
    assert_eq!(json["check"], "kernel");
    assert_eq!(json["result"], "ok");
}
