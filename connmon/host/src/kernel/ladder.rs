//! Which program serves each probe. Every rung is tried for real; any error,
//! whatever its errno, means the next one.

use std::fmt::Write as _;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::{
    BtfTracePoint, FEntry, FExit, KProbe, Program, ProgramError, RawTracePoint, TracePoint,
};
use connmon_common::tuning::tracepoint::ASSERTED;

use super::facts::MOUNT_TRACEFS;
use super::load::KernelTypes;
use super::{AttachChoice, Method, Probe, Rung, sys};

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
    /// Why higher rungs failed.
    reasons: Vec<String>,
}

/// Attaches the state program. Without it there is no tracing; the reasons
/// then stand in the rung.
pub fn attach_state(
    ebpf: &mut Ebpf,
    types: Result<&KernelTypes, &str>,
    choice: AttachChoice,
) -> (Rung, Option<Attached>) {
    let mut climb = Climb::new(ebpf, types);
    let mut attached = None;
    if choice == AttachChoice::Tracepoint {
        climb.reasons.push("--ebpf.attach is tracepoint".into());
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
/// came. The reason in words when that fails.
pub fn attach_second(
    ebpf: &mut Ebpf,
    types: Result<&KernelTypes, &str>,
    method: Method,
) -> Result<Attached, String> {
    if method == Method::TpBtf {
        let mut climb = Climb::new(ebpf, types);
        let attached = climb.try_rung(Probe::SetState, method, "state_nested");
        let (_, attached) = attached.ok_or_else(|| climb.reasons.join("; "))?;
        return Ok(attached);
    }
    let name = "state_lost";
    let attach = |program: &mut Program| {
        let program: &mut RawTracePoint = program.try_into()?;
        program.load()?;
        program.attach(Probe::SetState.label())?;
        Ok(program.fd()?.as_fd().try_clone_to_owned()?)
    };
    let program = program(ebpf, name)?;
    let attached = attach(program).map_err(|error: ProgramError| brief(&error));
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

/// Loads the walk over the table of sockets. The reason in words when that
/// fails.
pub fn socket_walk(ebpf: &mut Ebpf) -> Result<OwnedFd, String> {
    let program = program(ebpf, "sockets")?;
    let mut load = || {
        let program: &mut RawTracePoint = program.try_into()?;
        program.load()?;
        let fd = program.fd()?.as_fd().try_clone_to_owned()?;
        // Whoever walks holds it.
        program.unload()?;
        Ok(fd)
    };
    load().map_err(|error: ProgramError| brief(&error))
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
        AttachChoice::Kprobe => climb.reasons.push("--ebpf.attach is kprobe".into()),
        AttachChoice::Tracepoint => climb.reasons.push("--ebpf.attach is tracepoint".into()),
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
            reasons: Vec::new(),
        }
    }

    fn try_rung(
        &mut self,
        probe: Probe,
        method: Method,
        name: &'static str,
    ) -> Option<(Method, Attached)> {
        match self.attach(probe, method, name) {
            Ok(link) => match self.ebpf.program(name).map(|program| program.fd()) {
                Some(Ok(fd)) => match fd.as_fd().try_clone_to_owned() {
                    Ok(program) => Some((
                        method,
                        Attached {
                            probe,
                            name,
                            program,
                            link,
                        },
                    )),
                    Err(error) => self.refuse(method, error.to_string()),
                },
                _ => self.refuse(method, "program vanished".into()),
            },
            Err(reason) => {
                // A program that is loaded and not attached does no harm, but
                // it would stand in bpftool's list.
                // Fails when it was not even loaded.
                let _ = match self.ebpf.program_mut(name) {
                    Some(Program::BtfTracePoint(program)) => program.unload(),
                    Some(Program::TracePoint(program)) => program.unload(),
                    Some(Program::FEntry(program)) => program.unload(),
                    Some(Program::FExit(program)) => program.unload(),
                    Some(Program::KProbe(program)) => program.unload(),
                    _ => Ok(()),
                };
                self.refuse(method, reason)
            }
        }
    }

    fn refuse<T>(&mut self, method: Method, reason: String) -> Option<T> {
        self.reasons.push(format!("{}: {reason}", method.label()));
        None
    }

    fn attach(
        &mut self,
        probe: Probe,
        method: Method,
        name: &'static str,
    ) -> Result<Option<KprobeLink>, String> {
        let function = probe.label();
        if matches!(method, Method::TpBtf | Method::Fentry | Method::Fexit) {
            let types = self.types.map_err(str::to_owned)?;
            let btf = &types.attach;
            let program = program(self.ebpf, name)?;
            let result = match method {
                Method::TpBtf => (|| {
                    let program: &mut BtfTracePoint = program.try_into()?;
                    program.load(function, btf)?;
                    program.attach().map(|_| ())
                })(),
                Method::Fentry => (|| {
                    let program: &mut FEntry = program.try_into()?;
                    program.load(function, btf)?;
                    program.attach().map(|_| ())
                })(),
                _ => (|| {
                    let program: &mut FExit = program.try_into()?;
                    program.load(function, btf)?;
                    program.attach().map(|_| ())
                })(),
            };
            return result.map(|()| None).map_err(|error| brief(&error));
        }
        if method == Method::Tracepoint {
            check_format(&read_format()?)?;
        }
        let program = program(self.ebpf, name)?;
        let result: Result<Option<KprobeLink>, ProgramError> = match method {
            Method::Tracepoint => (|| {
                let program: &mut TracePoint = program.try_into()?;
                program.load()?;
                program.attach("sock", function)?;
                Ok(None)
            })(),
            _ => (|| {
                let program: &mut KProbe = program.try_into()?;
                program.load()?;
                let id = program.attach(function, 0)?;
                Ok(kprobe_link(program, id))
            })(),
        };
        result.map_err(|error| brief(&error))
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
        let reason = (!self.reasons.is_empty()).then(|| self.reasons.join("; "));
        (
            Rung {
                probe,
                method,
                reason,
            },
            attached,
        )
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program, String> {
    ebpf.program_mut(name)
        .ok_or_else(|| format!("the object has no program {name}"))
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

/// An error in one line: the verifier's log stands for itself by its last
/// telling line.
pub fn brief(error: &ProgramError) -> String {
    let mut text = match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            let mut text = format!("load: {io_error}");
            let log = verifier_log.to_string();
            let telling = log
                .lines()
                .map(str::trim)
                .rfind(|line| !line.is_empty() && !is_statistics(line));
            if let Some(line) = telling {
                let _ = write!(text, " ({line})");
            }
            text
        }
        ProgramError::SyscallError(error) => format!("{}: {}", error.call, error.io_error),
        error => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                let _ = write!(text, ": {cause}");
                source = cause.source();
            }
            text
        }
    };
    const LONGEST: usize = 300;
    if text.len() > LONGEST {
        let cut = (0..=LONGEST).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(cut.unwrap_or(0));
        text.push('…');
    }
    text.replace('\n', " ")
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

/// Where tracefs shows events.
pub const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// How a missing tracefs is told; the diagnosis goes by it.
pub const ABSENT_TRACEFS: &str = "tracefs is not mounted";
/// The same of one that keeps its files to itself.
pub const UNREADABLE_TRACEFS: &str = "tracefs cannot be read";

fn read_format() -> Result<String, String> {
    let mut last = None;
    for root in TRACEFS {
        match fs::read_to_string(format!("{root}/events/sock/inet_sock_set_state/format")) {
            Ok(format) => return Ok(format),
            Err(error) => last = last.or(Some(error)),
        }
    }
    Err(match last {
        Some(error) if error.kind() == std::io::ErrorKind::NotFound => {
            format!("{ABSENT_TRACEFS} ({MOUNT_TRACEFS})")
        }
        Some(error) => format!("{UNREADABLE_TRACEFS} ({error})"),
        None => UNREADABLE_TRACEFS.into(),
    })
}

/// Compares a tracepoint's `format` file with the layout that the program
/// was built for.
pub fn check_format(format: &str) -> Result<(), String> {
    for (name, offset, size) in ASSERTED {
        let found = format.lines().find_map(|line| {
            // "\tfield:__u8 saddr_v6[16];\toffset:40;\tsize:16;\tsigned:0;"
            let mut parts = line.trim().strip_prefix("field:")?.split(';');
            let declaration = parts.next()?;
            let declared = declaration.rsplit([' ', '*']).next()?;
            if declared.split('[').next()? != *name {
                return None;
            }
            let mut number = |prefix: &str| -> Option<usize> {
                parts.next()?.trim().strip_prefix(prefix)?.parse().ok()
            };
            Some((number("offset:")?, number("size:")?))
        });
        match found {
            Some(found) if found == (*offset, *size) => {}
            Some((at, of)) => {
                return Err(format!(
                    "the tracepoint has {name} at offset {at} with {of} bytes, not at {offset} with {size}"
                ));
            }
            None => return Err(format!("the tracepoint has no field {name}")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 5.10 to 7.2 show it.
    const FORMAT: &str = "\
name: inet_sock_set_state
ID: 1480
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:const void * skaddr;\toffset:8;\tsize:8;\tsigned:0;
\tfield:int oldstate;\toffset:16;\tsize:4;\tsigned:1;
\tfield:int newstate;\toffset:20;\tsize:4;\tsigned:1;
\tfield:__u16 sport;\toffset:24;\tsize:2;\tsigned:0;
\tfield:__u16 dport;\toffset:26;\tsize:2;\tsigned:0;
\tfield:__u16 family;\toffset:28;\tsize:2;\tsigned:0;
\tfield:__u16 protocol;\toffset:30;\tsize:2;\tsigned:0;
\tfield:__u8 saddr[4];\toffset:32;\tsize:4;\tsigned:0;
\tfield:__u8 daddr[4];\toffset:36;\tsize:4;\tsigned:0;
\tfield:__u8 saddr_v6[16];\toffset:40;\tsize:16;\tsigned:0;
\tfield:__u8 daddr_v6[16];\toffset:56;\tsize:16;\tsigned:0;
";

    #[test]
    fn the_known_format_passes_and_every_other_is_refused() {
        assert_eq!(check_format(FORMAT), Ok(()));
        // Before 5.6: one byte of protocol, addresses one byte earlier.
        let old = FORMAT.replace(
            "__u16 protocol;\toffset:30;\tsize:2",
            "__u8 protocol;\toffset:30;\tsize:1",
        );
        assert_eq!(
            check_format(&old).unwrap_err(),
            "the tracepoint has protocol at offset 30 with 1 bytes, not at 30 with 2"
        );
        // PREEMPT_RT of old: a longer common header.
        let shifted = FORMAT.replace("skaddr;\toffset:8", "skaddr;\toffset:16");
        assert!(
            check_format(&shifted)
                .unwrap_err()
                .contains("skaddr at offset 16")
        );
        let without = FORMAT.replace("newstate", "state");
        assert_eq!(
            check_format(&without).unwrap_err(),
            "the tracepoint has no field newstate"
        );
        assert!(check_format("").is_err());
    }
}
