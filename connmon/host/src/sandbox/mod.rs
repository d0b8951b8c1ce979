//! What each thread may still do once the agent runs: capabilities, a system
//! call filter (seccomp) and rules for the file system (Landlock).
//!
//! All three are per thread in Linux, so every thread enters its own sandbox:
//! the walker first, the fold after its programs are attached, the serving
//! thread last, once the listeners are bound and the files are read. SECURITY.md
//! has the table of what each keeps.
//!
//! A refused system call gets EPERM instead of a signal, in `strict` too: an
//! agent killed by a libc update that makes one more harmless call would be a
//! worse monitor than one that logs it.

mod capability;
mod paths;
mod syscalls;

pub use capability::{FEATURES, Feature, FeatureKind, held, missing_for_tracing, names};
pub use rustix::thread::CapabilitySet;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// `--sandbox`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxChoice {
    /// As much as the kernel has; a warning names what it lacks.
    Auto,
    /// All of it or fail.
    Strict,
    /// Nothing.
    Off,
}

/// A thread of the agent, by what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Enters namespaces, reads the kernel's tables, finds owners. Without
    /// Landlock: under any ruleset even root is refused `/proc/<pid>/ns/net` and
    /// `/proc/<pid>/fd` of processes outside its domain.
    Walker,
    /// Drains the ring and folds, once the programs are attached and the ring is
    /// mapped.
    Fold,
    /// HTTP, configuration, databases, once the listeners listen, the files are
    /// read and the notify socket is open.
    Serve,
    /// Writes the log to stderr.
    Log,
    /// `trace`, `list` and `top`, once their programs are attached and their
    /// walker has started. Without a filter and Landlock: it writes to a
    /// terminal and reads `/proc` and the time zone.
    Tool,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Walker => "walker",
            Self::Fold => "fold",
            Self::Serve => "serve",
            Self::Log => "log",
            Self::Tool => "tool",
        })
    }
}

/// One part of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// The process cannot be opened by others of its user.
    NotDumpable,
    /// `no_new_privs`.
    NoNewPrivs,
    /// Dropping what the role does not need.
    Capabilities,
    /// File system and TCP rules.
    Landlock,
    /// System call filter.
    Seccomp,
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotDumpable => "PR_SET_DUMPABLE",
            Self::NoNewPrivs => "no_new_privs",
            Self::Capabilities => "capability drop",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
        })
    }
}

/// What is in force in a thread; nothing with `--sandbox off`.
#[derive(Debug)]
pub struct Report {
    /// Measures that the kernel enforces.
    pub in_force: Vec<Measure>,
    /// Each measure that the role has and the kernel lacks, and why.
    pub lacks: Vec<String>,
    /// Permitted capabilities that are left.
    pub kept: CapabilitySet,
}

impl Report {
    fn add<E: fmt::Display>(&mut self, measure: Measure, result: Result<(), E>) {
        match result {
            Ok(()) => self.in_force.push(measure),
            Err(error) => self.lacks.push(format!("{measure}: {error}")),
        }
    }
}

/// What each thread will be left with; made once, before any thread starts.
#[derive(Debug)]
pub struct Plan {
    choice: SandboxChoice,
    walker_needs: CapabilitySet,
    readable: Vec<PathBuf>,
    warned: Mutex<BTreeSet<String>>,
}

impl Plan {
    /// A plan for an agent that watches all namespaces or only the host's,
    /// finds owners of listeners or not, and reloads no file.
    pub fn new(choice: SandboxChoice, all_netns: bool, listeners: bool) -> Self {
        Self {
            choice,
            walker_needs: capability::walker_needs(all_netns, listeners),
            readable: Vec::new(),
            warned: Mutex::default(),
        }
    }

    /// Adds a file that the serving thread reads again while it runs, such as a
    /// TLS certificate. Its directory becomes readable, so that renames and
    /// symlink swaps still reload.
    pub fn also_readable(&mut self, file: impl AsRef<Path>) {
        self.readable.push(file.as_ref().to_path_buf());
    }

    /// Puts the sandbox of `role` in force in the calling thread, and in those
    /// that it starts later.
    ///
    /// # Errors
    /// Only with `--sandbox strict`, when a measure cannot be put in force.
    pub fn enter(&self, role: Role) -> io::Result<Report> {
        let mut report = Report {
            in_force: Vec::new(),
            lacks: Vec::new(),
            kept: held(),
        };
        if self.choice == SandboxChoice::Off {
            return Ok(report);
        }
        // Before any capability is given up, see there.
        report.add(Measure::NotDumpable, make_not_dumpable());
        let no_new_privs = rustix::thread::set_no_new_privs(true);
        report.add(Measure::NoNewPrivs, no_new_privs);
        // Landlock and the capability calls come before the filter, which
        // refuses them.
        match role {
            Role::Walker | Role::Tool => {}
            Role::Fold | Role::Log => report.add(Measure::Landlock, paths::restrict(&[])),
            Role::Serve => report.add(Measure::Landlock, paths::restrict(&self.readable)),
        }
        let owners = CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH;
        let dropped = match role {
            Role::Walker => capability::keep(self.walker_needs),
            Role::Fold => capability::keep_for_map_lookups(CapabilitySet::empty()),
            Role::Serve => capability::keep_for_files(&self.readable),
            Role::Log => capability::keep(CapabilitySet::empty()),
            Role::Tool => capability::keep_for_map_lookups(owners),
        };
        report.add(Measure::Capabilities, dropped);
        if role != Role::Tool {
            report.add(Measure::Seccomp, syscalls::filter(role));
        }
        report.kept = held();
        let kept = names(report.kept);
        log::debug!("thread {role} sandboxed: {report:?}, capabilities kept: {kept}");
        if self.choice == SandboxChoice::Strict && !report.lacks.is_empty() {
            return Err(io::Error::other(format!(
                "--sandbox strict: thread {role} cannot be sandboxed: {}; \
                 --sandbox auto runs with what there is",
                report.lacks.join("; ")
            )));
        }
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        for lack in &report.lacks {
            if warned.insert(lack.clone()) {
                log::warn!("sandbox incomplete, running without: {lack}");
            }
        }
        drop(warned);
        Ok(report)
    }
}

/// Only holders of CAP_SYS_PTRACE may open, trace or read the process from now
/// on, and it dumps no core.
///
/// The threads share memory, but ptrace_may_access() (kernel/ptrace.c) compares
/// the capabilities of the one thread that is named: a thread that has given up
/// its own is open to every process of its user, and with it the memory of those
/// that have theirs. So this comes before any of them gives up one. It holds for
/// the process as long as its ids stay and no thread gains a capability
/// (`commit_creds()`, kernel/cred.c), which never happens.
fn make_not_dumpable() -> io::Result<()> {
    use rustix::process::{DumpableBehavior, Resource, Rlimit};
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    Ok(rustix::process::setrlimit(Resource::Core, none)?)
}
