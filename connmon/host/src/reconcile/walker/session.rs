//! A walk: lists the namespaces, enters each, has it read, and reports what
//! could not be read.

use std::fs::File;
use std::io;
use std::sync::mpsc as sync;

use connmon_core::event::{LiveSocket, NetnsId};
use connmon_core::scan::{Access, Trigger, Walk, WalkMessage, WalkSummary};
use rustix::time::ClockId;
use tokio::sync::mpsc;

use super::outbox::{Closed, Outbox};
use crate::is_resource_exhausted;
use crate::reconcile::clock::now_ns;
use crate::reconcile::diag::{self, DumpBuffer};
use crate::reconcile::netns::{self, Found, Namespace, Roots, ThreadSearch};
use crate::reconcile::procfs::Family;

/// Delivers every connection and handshake that is in the calling thread's
/// network namespace from beginning to end, which a dump does not promise. May
/// deliver one twice. The argument returns whether to go on. `Ok`: whether it
/// came to the end; an error does not undo what was delivered before.
pub type SocketSource =
    Box<dyn FnMut(&mut dyn FnMut(LiveSocket) -> bool) -> io::Result<bool> + Send>;

/// What holds for every walk.
pub struct WalkerOptions {
    /// Every namespace (`--netns all`), or the host's alone.
    pub all_netns: bool,
    /// Whether owners of listening sockets are looked for (`--listeners`).
    pub listeners: bool,
    /// Read `/proc` only (polling mode).
    pub force_proc: bool,
    /// For the initial scan, which drops it; without one that is two dumps.
    pub source: Option<SocketSource>,
    /// Where namespaces and processes are found.
    pub roots: Roots,
}

impl Default for WalkerOptions {
    fn default() -> Self {
        Self {
            all_netns: true,
            listeners: true,
            force_proc: false,
            source: None,
            roots: Roots::default(),
        }
    }
}

pub struct Session {
    pub options: WalkerOptions,
    own: NetnsId,
    /// The only one to be read, if not all are. Found before the sandbox,
    /// which refuses that.
    host: Option<Namespace>,
    threads: ThreadSearch,
    pub home: File,
    begun: sync::Receiver<()>,
    /// The walk is the initial scan.
    pub startup: bool,
    /// A shorter and a longer one: a dump skips sockets only where one of its
    /// parts ends, so two in a row do not skip the same ones.
    pub buffers: [DumpBuffer; 2],
    /// Which one: the other in each audit and in the second pass.
    pub longer: bool,
    pub outbox: Outbox,
    pub summary: WalkSummary,
}

/// A namespace that can be read.
pub struct Entered {
    /// `None`: through `/proc`.
    pub socket: Option<diag::Socket>,
    /// The namespace, unless it is the walker's own.
    pub there: Option<File>,
    pub ephemeral: (u16, u16),
    /// Why there is no socket, where one was wanted.
    pub reason: Option<String>,
    /// How it was read.
    pub access: Access,
    /// False when a pass was cut short.
    pub complete: bool,
}

pub enum Entry {
    Open(Entered),
    /// It ended meanwhile.
    Gone,
    /// The agent ran out of descriptors or memory.
    Exhausted(String),
    Refused(String),
}

impl Session {
    pub fn new(
        options: WalkerOptions,
        sender: mpsc::Sender<WalkMessage>,
        begun: sync::Receiver<()>,
    ) -> io::Result<Self> {
        let roots = &options.roots;
        Ok(Self {
            own: roots.own()?,
            host: match options.all_netns {
                true => None,
                false => Some(roots.host_namespace()?),
            },
            threads: ThreadSearch::default(),
            home: File::open(roots.proc.join("self/ns/net"))?,
            begun,
            startup: false,
            buffers: [DumpBuffer::shorter(), DumpBuffer::default()],
            longer: false,
            outbox: Outbox::new(sender, roots.clone()),
            summary: WalkSummary::default(),
            options,
        })
    }

    pub fn walk(&mut self, walk: Walk) -> Result<(), Closed> {
        let (wall, cpu) = (now_ns(ClockId::Monotonic), now_ns(ClockId::ThreadCPUTime));
        self.summary = WalkSummary::default();
        self.longer ^= walk.audit;
        self.startup = walk.trigger == Trigger::Startup;
        self.outbox.begin_walk(walk, self.options.listeners);
        self.outbox.send(WalkMessage::Begin(walk))?;
        self.begun.recv().map_err(|_| Closed)?;
        match self.find(walk.audit) {
            Ok(found) => self.namespaces(walk, &found)?,
            Err(error) => {
                self.summary.unlisted = true;
                let proc = self.options.roots.proc.display().to_string();
                self.unaudited(
                    1,
                    format!("{proc}: {error}; network namespaces are found there"),
                );
            }
        }
        let mut summary = std::mem::take(&mut self.summary);
        summary.duration_ns = now_ns(ClockId::Monotonic).saturating_sub(wall);
        summary.cpu_ns = now_ns(ClockId::ThreadCPUTime).saturating_sub(cpu);
        summary.owners_wait = self.outbox.owners.end_walk();
        if self.startup {
            summary.twice = self.options.source.take().is_none();
        }
        self.outbox.send(WalkMessage::End(summary))
    }

    pub fn find(&mut self, search: bool) -> io::Result<Found> {
        match &self.host {
            None => (self.options.roots).find(&self.home, &mut self.threads, search),
            Some(host) => Ok(Found {
                namespaces: vec![host.clone()],
                ..Found::default()
            }),
        }
    }

    pub fn namespaces(&mut self, walk: Walk, found: &Found) -> Result<(), Closed> {
        let (mut mounts, mut gone) = (Vec::new(), Vec::new());
        for namespace in &found.namespaces {
            match self.enter(namespace) {
                Entry::Open(entered) => self.read(walk, namespace, entered)?,
                Entry::Gone => gone.push(namespace),
                Entry::Exhausted(reason) => self.unread(namespace, &reason)?,
                Entry::Refused(reason) => {
                    self.skip(namespace, Access::Unaudited)?;
                    match namespace.is_mount_only() {
                        true => mounts.push(reason),
                        false => self.unaudited(1, reason),
                    }
                }
            }
        }
        if !gone.is_empty() {
            self.retry(walk, &gone)?;
        }
        // A name under /run/netns that may not be entered and a process whose
        // namespace may not be read are mostly of the same namespace: only
        // names beyond those read by a surrogate id count as unread.
        let beyond = (mounts.len() as u32).saturating_sub(self.summary.surrogates);
        if beyond > 0 {
            self.unaudited(beyond, mounts.swap_remove(0));
        }
        self.summary.unlisted |= found.incomplete || found.overflow > 0;
        if found.overflow > 0 {
            self.unaudited(
                found.overflow,
                format!(
                    "more than {} network namespaces; the rest is not read",
                    netns::MAX_NAMESPACES
                ),
            );
        }
        if let Some(reason) = &found.hidden {
            self.unaudited(1, reason.clone());
        }
        Ok(())
    }

    /// Every process that led into these namespaces has ended, but others may
    /// have started: looks for them once.
    fn retry(&mut self, walk: Walk, gone: &[&Namespace]) -> Result<(), Closed> {
        let found = match self.find(false) {
            Ok(found) => found,
            Err(error) => {
                for namespace in gone {
                    self.unread(namespace, &error.to_string())?;
                }
                return Ok(());
            }
        };
        for before in gone {
            let is_same =
                |now: &&Namespace| (now.id, now.surrogate) == (before.id, before.surrogate);
            let Some(now) = found.namespaces.iter().find(is_same) else {
                self.summary.unlisted |= found.incomplete;
                continue;
            };
            match self.enter(now) {
                Entry::Open(entered) => self.read(walk, now, entered)?,
                Entry::Gone => self.unread(now, "its processes start and end too fast")?,
                Entry::Exhausted(reason) | Entry::Refused(reason) => self.unread(now, &reason)?,
            }
        }
        Ok(())
    }

    /// A namespace that is there and could not be read this time.
    fn unread(&mut self, namespace: &Namespace, reason: &str) -> Result<(), Closed> {
        self.skip(namespace, Access::Proc)?;
        self.unaudited(1, format!("network namespace {}: {reason}", namespace.id));
        Ok(())
    }

    /// Names a namespace without rows.
    fn skip(&mut self, namespace: &Namespace, access: Access) -> Result<(), Closed> {
        self.begin(namespace, netns::DEFAULT_EPHEMERAL)?;
        self.end(namespace, access, false)
    }

    /// Finds a way to read a namespace: sock_diag, else `/proc`.
    pub fn enter(&self, namespace: &Namespace) -> Entry {
        let mut reason = None;
        let inside = || {
            let wanted = !self.options.force_proc;
            let socket = wanted.then(diag::Socket::open).transpose();
            (socket, netns::ephemeral_ports())
        };
        let is_own = namespace.id == self.own && !namespace.surrogate;
        let (there, (socket, ephemeral)) = if is_own {
            (None, inside())
        } else {
            match self.within_one_of(namespace, inside, &mut reason) {
                Some((there, found)) => (Some(there), found),
                // The ports of one that cannot be entered cannot be read; most
                // have the host's.
                None => (None, (Ok(None), netns::ephemeral_ports())),
            }
        };
        let socket = socket.unwrap_or_else(|error| {
            reason.get_or_insert(format!("sock_diag socket: {error}"));
            None
        });
        if socket.is_none() {
            match self.table(namespace, Family::V4) {
                Ok(_) => {}
                Err(error) if is_gone(&error) => return Entry::Gone,
                Err(error) if is_resource_exhausted(&error) => {
                    return Entry::Exhausted(error.to_string());
                }
                Err(error) => {
                    return Entry::Refused(reason.unwrap_or_else(|| error.to_string()));
                }
            }
        }
        Entry::Open(Entered {
            reason: reason.filter(|_| socket.is_none() && !self.options.force_proc),
            socket,
            there,
            ephemeral,
            access: Access::Diag,
            complete: true,
        })
    }

    /// Runs `inside` in a namespace by the first handle that leads there;
    /// `reason` gets why one does not.
    fn within_one_of<T>(
        &self,
        namespace: &Namespace,
        inside: impl Fn() -> T,
        reason: &mut Option<String>,
    ) -> Option<(File, T)> {
        let id = namespace.id;
        for handle in &namespace.handles {
            let (error, capability) = match self.options.roots.open(namespace, handle) {
                Ok(there) => match netns::within(&there, &self.home, &inside) {
                    Ok(found) => return Some((there, found)),
                    Err(error) => (error, "CAP_SYS_ADMIN"),
                },
                Err(error) if is_gone(&error) => continue,
                Err(error) => (error, "CAP_SYS_PTRACE"),
            };
            reason.get_or_insert_with(|| {
                format!("network namespace {id}: {error}; {capability} is needed to enter it")
            });
        }
        None
    }

    pub fn begin(&mut self, namespace: &Namespace, ephemeral: (u16, u16)) -> Result<(), Closed> {
        self.outbox.send(WalkMessage::NamespaceBegin {
            netns: namespace.id,
            surrogate: namespace.surrogate,
            t0_ns: now_ns(ClockId::Monotonic),
            ephemeral,
        })
    }

    pub fn end(
        &mut self,
        namespace: &Namespace,
        access: Access,
        complete: bool,
    ) -> Result<(), Closed> {
        self.outbox.send(WalkMessage::NamespaceEnd {
            netns: namespace.id,
            access,
            complete,
        })
    }

    fn unaudited(&mut self, namespaces: u32, reason: String) {
        self.summary.unaudited += namespaces;
        self.summary.reason.get_or_insert(reason);
    }
}

/// Whether a process or a namespace has ended.
pub fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
