//! Attaches each probe by the best method that works. Every method is tried,
//! and any error, whatever its errno, leads to the next one.

use std::os::fd::{AsFd, OwnedFd};

use aya::programs::kprobe::KProbeLinkId;
use aya::programs::links::FdLink;
use aya::programs::{KProbe, Program, ProgramError, RawTracePoint};
use aya::{Btf, Ebpf};
use connmon_core::probe::{AttachFailure, Method, Probe, Rung, Stage};

use super::error::failure;
use super::load::KernelTypes;
use super::{AttachChoice, sys, tracefs};

/// A program that was loaded and attached, and stays so while [`Ebpf`] lives.
#[derive(Debug)]
pub struct Attached {
    /// Its probe.
    pub probe: Probe,
    /// Name in the object.
    pub name: &'static str,
    /// The program.
    pub program: OwnedFd,
    /// The link of a kprobe, if the kernel has such links (5.15).
    pub link: Option<KprobeLink>,
}

/// Keeps a kprobe attached, and gives its missed runs.
#[derive(Debug)]
pub struct KprobeLink {
    /// The link, opened again by its id; `None` if the kernel refused.
    pub fd: Option<OwnedFd>,
    /// aya's link, which does not expose its descriptor.
    _link: FdLink,
}

/// Attaches a probe. Without a state program there is no tracing; the rung then
/// has a failure for each method. Counts do not depend on the function probes.
pub fn attach_probe(
    ebpf: &mut Ebpf,
    types: Result<&KernelTypes, &str>,
    choice: AttachChoice,
    probe: Probe,
) -> (Rung, Option<Attached>) {
    let mut rung = Rung {
        probe,
        method: Method::None,
        failures: Vec::new(),
    };
    for (method, name) in methods(probe) {
        if !choice.allows(method) {
            if rung.failures.is_empty() {
                let message = format!("--ebpf.attach is {}", choice.label());
                let excluded = AttachFailure::new(method, Stage::Configuration, message);
                rung.failures.push(excluded);
            }
            continue;
        }
        match attach(ebpf, types, probe, method, name) {
            Ok(attached) => {
                rung.method = method;
                return (rung, Some(attached));
            }
            Err(failure) => rung.failures.push(failure),
        }
    }
    (rung, None)
}

/// Attaches the second state program, which handles or counts the recursion
/// misses of the first. The first must be attached already, since the kernel
/// runs the programs of a tracepoint in the order of attachment.
pub fn attach_second(
    ebpf: &mut Ebpf,
    types: Result<&KernelTypes, &str>,
    method: Method,
) -> Result<Attached, AttachFailure> {
    let name = match method {
        Method::TpBtf => "state_nested",
        _ => "state_lost",
    };
    attach(ebpf, types, Probe::SetState, method, name)
}

/// Loads the program that scans the socket table.
pub fn socket_walk(ebpf: &mut Ebpf) -> Result<OwnedFd, AttachFailure> {
    let program = program(ebpf, "sockets")?;
    let mut load = || {
        let program: &mut RawTracePoint = program.try_into()?;
        program.load()?;
        let fd = program.fd()?.as_fd().try_clone_to_owned()?;
        // The returned descriptor keeps it.
        program.unload()?;
        Ok(fd)
    };
    load().map_err(|error| failure(Method::None, &error))
}

/// Methods and programs of a probe, best first.
fn methods(probe: Probe) -> [(Method, &'static str); 2] {
    match probe {
        Probe::SetState => [
            (Method::TpBtf, "state_tp_btf"),
            (Method::Tracepoint, "state_tp"),
        ],
        Probe::Connect => [
            (Method::Fentry, "connect_fentry"),
            (Method::Kprobe, "connect_kprobe"),
        ],
        Probe::Accept => {
            // By version and not by trial: from 6.10 on `accept_fexit_arg` can
            // load, and would read past the return value.
            let has_func_ret = super::kernel_version() >= (5, 17);
            let fexit = match has_func_ret {
                true => "accept_fexit",
                false => "accept_fexit_arg",
            };
            [(Method::Fexit, fexit), (Method::Kretprobe, "accept_kret")]
        }
    }
}

fn attach(
    ebpf: &mut Ebpf,
    types: Result<&KernelTypes, &str>,
    probe: Probe,
    method: Method,
    name: &'static str,
) -> Result<Attached, AttachFailure> {
    let types = match (method, types) {
        (Method::TpBtf | Method::Fentry | Method::Fexit, Err(reason)) => {
            return Err(AttachFailure::new(method, Stage::Btf, reason));
        }
        (_, types) => types.ok().map(|types| &types.attach),
    };
    let program = program(ebpf, name)?;
    if matches!(program, Program::TracePoint(_)) {
        tracefs::check_tracepoint()?;
    }
    let attached = load_and_attach(program, probe.label(), types).and_then(|link| {
        Ok(Attached {
            probe,
            name,
            program: program.fd()?.as_fd().try_clone_to_owned()?,
            link,
        })
    });
    attached.map_err(|error| {
        // A loaded program that is not attached is harmless, but bpftool would
        // list it. This fails if it was not loaded.
        let _ = match program {
            Program::BtfTracePoint(program) => program.unload(),
            Program::TracePoint(program) => program.unload(),
            Program::RawTracePoint(program) => program.unload(),
            Program::FEntry(program) => program.unload(),
            Program::FExit(program) => program.unload(),
            Program::KProbe(program) => program.unload(),
            _ => Ok(()),
        };
        failure(method, &error)
    })
}

/// `types` is needed where the kernel attaches by BTF id.
fn load_and_attach(
    program: &mut Program,
    hook: &str,
    types: Option<&Btf>,
) -> Result<Option<KprobeLink>, ProgramError> {
    match (program, types) {
        (Program::BtfTracePoint(program), Some(types)) => {
            program.load(hook, types)?;
            program.attach()?;
        }
        (Program::FEntry(program), Some(types)) => {
            program.load(hook, types)?;
            program.attach()?;
        }
        (Program::FExit(program), Some(types)) => {
            program.load(hook, types)?;
            program.attach()?;
        }
        (Program::TracePoint(program), _) => {
            program.load()?;
            program.attach("sock", hook)?;
        }
        (Program::RawTracePoint(program), _) => {
            program.load()?;
            program.attach(hook)?;
        }
        (Program::KProbe(program), _) => {
            program.load()?;
            let id = program.attach(hook, 0)?;
            return Ok(kprobe_link(program, id));
        }
        _ => return Err(ProgramError::UnexpectedProgramType),
    }
    Ok(None)
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program, AttachFailure> {
    let message = || format!("the object has no program {name}");
    ebpf.program_mut(name)
        .ok_or_else(|| AttachFailure::new(Method::None, Stage::Load, message()))
}

/// `None` before 5.15: the attachment is no link then, and aya keeps it.
fn kprobe_link(program: &mut KProbe, id: KProbeLinkId) -> Option<KprobeLink> {
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
