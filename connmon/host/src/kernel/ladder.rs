//! Which program serves each probe. Every rung is tried for real; any error,
//! whatever its errno, means the next one.

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use aya::programs::links::FdLink;
use aya::programs::{
    BtfTracePoint, FEntry, FExit, KProbe, Program, ProgramError, RawTracePoint, TracePoint,
};
use aya::{Btf, Ebpf};
use connmon_core::probe::{AttachFailure, Method, Probe, Rung, Stage};

use super::load::KernelTypes;
use super::{AttachChoice, sys, tracefs};

/// A program that was loaded and attached, and stays so while [`Ebpf`] lives.
#[derive(Debug)]
pub struct Attached {
    /// What it serves.
    pub probe: Probe,
    /// Name in the object.
    pub name: &'static str,
    /// The program.
    pub program: OwnedFd,
    /// The link of a kprobe, where the kernel has such links (5.15).
    pub link: Option<KprobeLink>,
}

/// Holds a kprobe's attachment, and can be asked for missed runs.
#[derive(Debug)]
pub struct KprobeLink {
    /// The link once more, by id; `None` where the kernel refused.
    pub fd: Option<OwnedFd>,
    /// What aya keeps; it shows no descriptor.
    _link: FdLink,
}

/// Climbs down for one probe.
struct Climb<'a> {
    ebpf: &'a mut Ebpf,
    types: Result<&'a KernelTypes, &'a str>,
    /// Why better methods failed.
    failures: Vec<AttachFailure>,
}

/// Attaches the state program. Without it there is no tracing; the rung then
/// has a failure for each method.
pub fn attach_state(
    ebpf: &mut Ebpf,
    types: Result<&KernelTypes, &str>,
    choice: AttachChoice,
) -> (Rung, Option<Attached>) {
    let mut climb = Climb::new(ebpf, types);
    let mut attached = None;
    if choice == AttachChoice::Tracepoint {
        climb.exclude(Method::TpBtf, choice);
    } else {
        attached = climb.try_rung(Probe::SetState, Method::TpBtf, "state_tp_btf");
    }
    if attached.is_none() {
        attached = climb.try_rung(Probe::SetState, Method::Tracepoint, "state_tp");
    }
    climb.finish(Probe::SetState, attached)
}

/// Attaches the second of the state program, which must be attached already:
/// the kernel runs the programs of a tracepoint in the order in which they
/// came.
pub fn attach_second(
    ebpf: &mut Ebpf,
    types: Result<&KernelTypes, &str>,
    method: Method,
) -> Result<Attached, AttachFailure> {
    if method == Method::TpBtf {
        let mut climb = Climb::new(ebpf, types);
        let attached = climb.try_rung(Probe::SetState, method, "state_nested");
        return attached
            .map(|(_, attached)| attached)
            .ok_or_else(|| climb.failures.remove(0));
    }
    let name = "state_lost";
    let attach = |program: &mut Program| {
        let program: &mut RawTracePoint = program.try_into()?;
        program.load()?;
        program.attach(Probe::SetState.label())?;
        Ok(program.fd()?.as_fd().try_clone_to_owned()?)
    };
    let program = program(ebpf, name)?;
    let attached = attach(program).map_err(|error| failure(method, &error));
    if attached.is_err()
        && let Program::RawTracePoint(program) = program
    {
        // As in `Climb::try_rung`.
        let _ = program.unload();
    }
    Ok(Attached {
        probe: Probe::SetState,
        name,
        program: attached?,
        link: None,
    })
}

/// Loads the walk over the table of sockets.
pub fn socket_walk(ebpf: &mut Ebpf) -> Result<OwnedFd, AttachFailure> {
    let program = program(ebpf, "sockets")?;
    let mut load = || {
        let program: &mut RawTracePoint = program.try_into()?;
        program.load()?;
        let fd = program.fd()?.as_fd().try_clone_to_owned()?;
        // Whoever walks holds it.
        program.unload()?;
        Ok(fd)
    };
    load().map_err(|error| failure(Method::None, &error))
}

/// Attaches a function probe. Counts do not depend on it.
pub fn attach_function(
    ebpf: &mut Ebpf,
    types: Result<&KernelTypes, &str>,
    choice: AttachChoice,
    probe: Probe,
) -> (Rung, Option<Attached>) {
    let (trampoline, method, breakpoint, fallback) = match probe {
        Probe::Connect => (
            "connect_fentry",
            Method::Fentry,
            "connect_kprobe",
            Method::Kprobe,
        ),
        _ if kernel_has_func_ret() => (
            "accept_fexit",
            Method::Fexit,
            "accept_kret",
            Method::Kretprobe,
        ),
        _ => (
            "accept_fexit_arg",
            Method::Fexit,
            "accept_kret",
            Method::Kretprobe,
        ),
    };
    let mut climb = Climb::new(ebpf, types);
    let mut attached = None;
    match choice {
        AttachChoice::Auto | AttachChoice::Fentry => {
            attached = climb.try_rung(probe, method, trampoline);
        }
        AttachChoice::Kprobe | AttachChoice::Tracepoint => climb.exclude(method, choice),
    }
    match choice {
        AttachChoice::Auto | AttachChoice::Kprobe if attached.is_none() => {
            attached = climb.try_rung(probe, fallback, breakpoint);
        }
        _ => {}
    }
    climb.finish(probe, attached)
}

impl<'a> Climb<'a> {
    fn new(ebpf: &'a mut Ebpf, types: Result<&'a KernelTypes, &'a str>) -> Self {
        Self {
            ebpf,
            types,
            failures: Vec::new(),
        }
    }

    /// A method that the configuration excludes.
    fn exclude(&mut self, method: Method, choice: AttachChoice) {
        let message = format!("--ebpf.attach is {}", choice.label());
        self.failures
            .push(AttachFailure::new(method, Stage::Configuration, message));
    }

    fn try_rung(
        &mut self,
        probe: Probe,
        method: Method,
        name: &'static str,
    ) -> Option<(Method, Attached)> {
        match self.attach(probe, method, name) {
            Ok(attached) => Some((method, attached)),
            Err(failure) => {
                // A program that is loaded and not attached does no harm, but
                // bpftool would list it. Fails when it was not even loaded.
                let _ = match self.ebpf.program_mut(name) {
                    Some(Program::BtfTracePoint(program)) => program.unload(),
                    Some(Program::TracePoint(program)) => program.unload(),
                    Some(Program::FEntry(program)) => program.unload(),
                    Some(Program::FExit(program)) => program.unload(),
                    Some(Program::KProbe(program)) => program.unload(),
                    _ => Ok(()),
                };
                self.failures.push(failure);
                None
            }
        }
    }

    fn attach(
        &mut self,
        probe: Probe,
        method: Method,
        name: &'static str,
    ) -> Result<Attached, AttachFailure> {
        let types = match (method, self.types) {
            (Method::TpBtf | Method::Fentry | Method::Fexit, Err(reason)) => {
                return Err(AttachFailure::new(method, Stage::Btf, reason));
            }
            (_, types) => types.ok().map(|types| &types.attach),
        };
        if method == Method::Tracepoint {
            tracefs::check_tracepoint()?;
        }
        let program = program(self.ebpf, name)?;
        let attached = attach_by(program, method, probe.label(), types).and_then(|link| {
            let program = program.fd()?.as_fd().try_clone_to_owned()?;
            Ok((program, link))
        });
        let (program, link) = attached.map_err(|error| failure(method, &error))?;
        Ok(Attached {
            probe,
            name,
            program,
            link,
        })
    }

    fn finish(
        self,
        probe: Probe,
        attached: Option<(Method, Attached)>,
    ) -> (Rung, Option<Attached>) {
        let (method, attached) = match attached {
            Some((method, attached)) => (method, Some(attached)),
            None => (Method::None, None),
        };
        let failures = self.failures;
        (
            Rung {
                probe,
                method,
                failures,
            },
            attached,
        )
    }
}

/// Loads and attaches a program, by a kprobe unless `method` is another.
fn attach_by(
    program: &mut Program,
    method: Method,
    function: &str,
    types: Option<&Btf>,
) -> Result<Option<KprobeLink>, ProgramError> {
    match (method, types) {
        (Method::TpBtf, Some(types)) => {
            let program: &mut BtfTracePoint = program.try_into()?;
            program.load(function, types)?;
            program.attach()?;
        }
        (Method::Fentry, Some(types)) => {
            let program: &mut FEntry = program.try_into()?;
            program.load(function, types)?;
            program.attach()?;
        }
        (Method::Fexit, Some(types)) => {
            let program: &mut FExit = program.try_into()?;
            program.load(function, types)?;
            program.attach()?;
        }
        (Method::Tracepoint, _) => {
            let program: &mut TracePoint = program.try_into()?;
            program.load()?;
            program.attach("sock", function)?;
        }
        _ => {
            let program: &mut KProbe = program.try_into()?;
            program.load()?;
            let id = program.attach(function, 0)?;
            return Ok(kprobe_link(program, id));
        }
    }
    Ok(None)
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program, AttachFailure> {
    let message = || format!("the object has no program {name}");
    ebpf.program_mut(name)
        .ok_or_else(|| AttachFailure::new(Method::None, Stage::Load, message()))
}

/// The link of a kprobe as a descriptor that can be asked for missed runs;
/// `None` before 5.15, where the attachment is no link and aya keeps it.
fn kprobe_link(
    program: &mut KProbe,
    id: aya::programs::kprobe::KProbeLinkId,
) -> Option<KprobeLink> {
    if !aya::features().bpf_perf_link() {
        return None;
    }
    let link = FdLink::try_from(program.take_link(id).ok()?).ok()?;
    let id = link.info().ok().map(|info| info.id());
    Some(KprobeLink {
        fd: id.and_then(|id| sys::link_by_id(id).ok()),
        _link: link,
    })
}

/// `bpf_get_func_ret` came with 5.17; the program for older kernels must not
/// be used from 6.10 on, so the version decides and not a trial.
fn kernel_has_func_ret() -> bool {
    super::kernel_version() >= (5, 17)
}

/// What kept a program from being loaded and attached by `method`.
pub fn failure(method: Method, error: &ProgramError) -> AttachFailure {
    let (stage, message, verifier_log) = match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            let log = telling_lines(&verifier_log.to_string());
            (Stage::Load, format!("load: {io_error}"), log)
        }
        ProgramError::SyscallError(error) => {
            let message = format!("{}: {}", error.call, error.io_error);
            (Stage::Attach, message, String::new())
        }
        ProgramError::Btf(_) => (Stage::Btf, chain(error), String::new()),
        error => (Stage::Attach, chain(error), String::new()),
    };
    AttachFailure {
        method,
        stage,
        errno: errno(error),
        message: cut(&message, LONGEST_MESSAGE),
        verifier_log,
    }
}

/// Most bytes of an error's message.
const LONGEST_MESSAGE: usize = 300;
/// Most bytes of a verifier log that are kept.
const LONGEST_LOG: usize = 2048;

/// An error and its causes in one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// The error number at the end of an error's causes.
pub fn errno(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        cause = error.source();
    }
    None
}

/// The end of a verifier log, without its statistics.
fn telling_lines(log: &str) -> String {
    let lines = log.lines().map(str::trim);
    let lines: Vec<_> = lines
        .filter(|line| !line.is_empty() && !is_statistics(line))
        .collect();
    let mut from = lines.len();
    let mut bytes = 0;
    while from > 0 && bytes + lines[from - 1].len() < LONGEST_LOG {
        from -= 1;
        bytes += lines[from].len() + 1;
    }
    lines[from..].join("\n")
}

fn cut(text: &str, most: usize) -> String {
    let end = text.floor_char_boundary(most);
    let more = if end < text.len() { "…" } else { "" };
    format!("{}{more}", text[..end].replace('\n', " "))
}

fn is_statistics(line: &str) -> bool {
    [
        "processed ",
        "verification time",
        "stack depth",
        "peak_states",
        "mark_read",
    ]
    .iter()
    .any(|start| line.starts_with(start))
}
