//! What is left to each thread once the agent runs: capabilities, a system
//! call filter (seccomp) and a view of the file system (Landlock).
//!
//! All three are per thread in Linux, so every thread closes itself in, in
//! this order: the walker first (it starts first and keeps most), the fold
//! after its programs are attached, the serving thread last, once the
//! listeners are bound and the files are read:
//!
//! | room | capabilities kept | file system | opens sockets |
//! |---|---|---|---|
//! | [`Room::Walker`] | CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH, as far as its features need them | read only, everywhere | netlink only |
//! | [`Room::Fold`] | CAP_BPF where the kernel asks for it on map lookups (before 6.0) | /proc/self, read only | none |
//! | [`Room::Log`] | none | /proc/self, read only | none |
//! | [`Room::Serve`] | none (CAP_DAC_READ_SEARCH if a file that is reloaded cannot be read without it) | the directories of the files that are reloaded and /proc/self, read only | none |
//!
//! The walker has no Landlock: under any ruleset even root is refused
//! `/proc/<pid>/ns/net` and `/proc/<pid>/fd` of processes outside its domain.
//! `no_new_privs` holds for all. A refused system call gets EPERM instead of
//! a signal, in `strict` too: an agent killed by a libc update that asks for
//! one more harmless call would be a worse monitor than one that logs it.
//!
//! Threads share memory. This confines what a logic error can reach; it does
//! not contain code running inside the process (SECURITY.md).

mod capability;
mod paths;
mod syscalls;

pub use capability::{Feature, FeatureKind, features, held, missing_for_tracing, name};
pub use rustix::thread::CapabilitySet;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// `--sandbox`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxChoice {
    /// As much as the kernel has, and say what it lacks.
    Auto,
    /// All of it or fail.
    Strict,
    /// Nothing.
    Off,
}

/// A thread of the agent, by what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Room {
    /// Enumerates namespaces, reads the kernel's tables, finds owners.
    Walker,
    /// Drains the ring and folds.
    Fold,
    /// HTTP, configuration, databases.
    Serve,
    /// Writes the log to stderr.
    Log,
}

impl Room {
    #[cfg(test)]
    const ALL: [Self; 4] = [Self::Walker, Self::Fold, Self::Serve, Self::Log];
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Walker => "walker",
            Self::Fold => "fold",
            Self::Serve => "serve",
            Self::Log => "log",
        })
    }
}

/// One measure in one room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Measure {
    /// The kernel enforces it.
    InForce,
    /// Not part of this room, or `--sandbox off`.
    NotWanted,
    /// Wanted, and why it is not there.
    Missing(String),
}

/// What is in force in a room after it was entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Room.
    pub room: Room,
    /// The process cannot be opened by others of its user.
    pub not_dumpable: Measure,
    /// `no_new_privs`.
    pub no_new_privs: Measure,
    /// Dropping what the room does not need.
    pub capabilities: Measure,
    /// Permitted capabilities that are left.
    pub kept: CapabilitySet,
    /// System call filter.
    pub seccomp: Measure,
    /// File system and TCP rules.
    pub landlock: Measure,
}

impl Report {
    /// Every measure that is wanted and not there, in words.
    pub fn lacks(&self) -> Vec<String> {
        [
            ("closing the process's memory", &self.not_dumpable),
            ("no_new_privs", &self.no_new_privs),
            ("capability drop", &self.capabilities),
            ("seccomp", &self.seccomp),
            ("landlock", &self.landlock),
        ]
        .into_iter()
        .filter_map(|(what, measure)| match measure {
            Measure::Missing(why) => Some(format!("{what}: {why}")),
            Measure::InForce | Measure::NotWanted => None,
        })
        .collect()
    }
}

/// `key=value` pairs for the log.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |measure: &Measure| match measure {
            Measure::InForce => "on",
            Measure::NotWanted => "off",
            Measure::Missing(_) => "missing",
        };
        write!(
            f,
            "thread {} sandboxed: not_dumpable={} no_new_privs={} capabilities={} seccomp={} landlock={}",
            self.room,
            word(&self.not_dumpable),
            word(&self.no_new_privs),
            capability::names(self.kept),
            word(&self.seccomp),
            word(&self.landlock),
        )
    }
}

/// Why a room could not be entered with `--sandbox strict`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StrictError {
    /// Room.
    pub room: Room,
    /// See [`Report::lacks`].
    pub lacks: Vec<String>,
}

impl fmt::Display for StrictError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "--sandbox strict: thread {} cannot be closed in: {}; --sandbox auto runs with what there is",
            self.room,
            self.lacks.join("; ")
        )
    }
}

impl std::error::Error for StrictError {}

/// What each thread will be left with; made once, before any thread starts.
#[derive(Debug)]
pub struct Plan {
    choice: SandboxChoice,
    walker_needs: CapabilitySet,
    readable: Vec<PathBuf>,
    said: Mutex<BTreeSet<String>>,
}

impl Plan {
    /// A plan for an agent that watches all namespaces or only the host's,
    /// keeps a listener inventory or not, and reloads no file.
    pub fn new(choice: SandboxChoice, all_netns: bool, listeners: bool) -> Self {
        Self {
            choice,
            walker_needs: capability::walker_needs(all_netns, listeners),
            readable: Vec::new(),
            said: Mutex::default(),
        }
    }

    /// Adds a file that the serving thread reads again while it runs (a TLS
    /// certificate named in the web configuration, say). Its directory
    /// becomes readable, so that renames and symlink swaps still reload.
    pub fn also_readable(&mut self, file: impl AsRef<Path>) {
        self.readable.push(file.as_ref().to_path_buf());
    }

    /// Closes in the calling thread as the walker. Threads that it starts
    /// later inherit the walls.
    ///
    /// # Errors
    /// Only with `--sandbox strict`, when a measure cannot be put in force.
    pub fn enter_walker(&self) -> Result<Report, StrictError> {
        self.enter(Room::Walker, || capability::keep(self.walker_needs))
    }

    /// Closes in the calling thread as the fold. Call it when the programs
    /// are attached and the ring is mapped.
    ///
    /// # Errors
    /// Only with `--sandbox strict`, when a measure cannot be put in force.
    pub fn enter_fold(&self) -> Result<Report, StrictError> {
        self.enter(Room::Fold, || {
            capability::keep_for_map_lookups(CapabilitySet::empty())
        })
    }

    /// Closes in the calling thread as the one that serves. Call it when the
    /// listeners listen, the files are read and the notify socket is open.
    ///
    /// # Errors
    /// Only with `--sandbox strict`, when a measure cannot be put in force.
    pub fn enter_serve(&self) -> Result<Report, StrictError> {
        self.enter(Room::Serve, || capability::keep_for_files(&self.readable))
    }

    /// Closes in the calling thread as the one that writes the log.
    ///
    /// # Errors
    /// Only with `--sandbox strict`, when a measure cannot be put in force.
    pub fn enter_log(&self) -> Result<Report, StrictError> {
        self.enter(Room::Log, || capability::keep(CapabilitySet::empty()))
    }

    /// Leaves the calling thread what the tools (`trace`, `list`, `top`) go
    /// on with once their programs are attached and their walker has started:
    /// the owners of sockets. `no_new_privs`, but neither filter nor Landlock:
    /// it writes to a terminal and reads `/proc` and the time zone.
    ///
    /// # Errors
    /// Only with `--sandbox strict`.
    pub fn enter_tool(&self) -> std::io::Result<()> {
        if self.choice == SandboxChoice::Off {
            return Ok(());
        }
        let owners = CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH;
        let dropped = make_not_dumpable()
            .and_then(|()| Ok(rustix::thread::set_no_new_privs(true)?))
            .and_then(|()| capability::keep_for_map_lookups(owners));
        match dropped {
            Err(error) if self.choice == SandboxChoice::Strict => Err(std::io::Error::other(
                format!("--sandbox strict: capabilities cannot be dropped: {error}"),
            )),
            Err(error) => {
                self.say_once(format!("capability drop: {error}"));
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn enter(
        &self,
        room: Room,
        drop_capabilities: impl FnOnce() -> std::io::Result<()>,
    ) -> Result<Report, StrictError> {
        if self.choice == SandboxChoice::Off {
            return Ok(Report {
                room,
                not_dumpable: Measure::NotWanted,
                no_new_privs: Measure::NotWanted,
                capabilities: Measure::NotWanted,
                kept: held(),
                seccomp: Measure::NotWanted,
                landlock: Measure::NotWanted,
            });
        }
        // Before anything is given up, see there.
        let not_dumpable = measure(make_not_dumpable());
        let no_new_privs = measure(rustix::thread::set_no_new_privs(true));
        // Landlock before the filter, which refuses its system calls; the
        // filter after the capability calls for the same reason.
        let landlock = match room {
            Room::Walker => Measure::NotWanted,
            Room::Fold | Room::Log => measure(paths::restrict(&[])),
            Room::Serve => measure(paths::restrict(&self.readable)),
        };
        let capabilities = measure(drop_capabilities());
        let seccomp = measure(syscalls::filter(room));
        let report = Report {
            room,
            not_dumpable,
            no_new_privs,
            capabilities,
            kept: held(),
            seccomp,
            landlock,
        };
        log::debug!("{report}");
        let lacks = report.lacks();
        if self.choice == SandboxChoice::Strict && !lacks.is_empty() {
            return Err(StrictError { room, lacks });
        }
        for lack in lacks {
            self.say_once(lack);
        }
        Ok(report)
    }

    fn say_once(&self, lack: String) {
        let mut said = self
            .said
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if !said.contains(&lack) {
            log::warn!("sandbox incomplete, running without: {lack}");
            said.insert(lack);
        }
    }
}

/// Nobody but who has CAP_SYS_PTRACE may open, trace or read the process from
/// now on, and it dumps no core.
///
/// The threads share memory, but ptrace_may_access() (kernel/ptrace.c)
/// compares the capabilities of the one thread that is named: a thread that
/// has given up its own is open to every process of its user, and with it the
/// memory of those that have theirs. So this comes before any of them gives
/// up one. It holds for the process as long as its ids stay and no thread
/// gains a capability (`commit_creds()`, kernel/cred.c); neither happens, and
/// every thread does it again.
fn make_not_dumpable() -> std::io::Result<()> {
    use rustix::process::{DumpableBehavior, Resource, Rlimit};
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    Ok(rustix::process::setrlimit(Resource::Core, none)?)
}

fn measure<E: fmt::Display>(result: Result<(), E>) -> Measure {
    match result {
        Ok(()) => Measure::InForce,
        Err(error) => Measure::Missing(error.to_string()),
    }
}
