//! A walk: finds the namespaces, enters each, has it read, and reports what
//! could not be read.

use std::fs::File;
use std::io;
use std::sync::mpsc as sync;

use connmon_core::event::NetnsId;
use connmon_core::scan::{Access, Trigger, Walk, WalkMessage, WalkSummary};
use rustix::time::ClockId;
use tokio::sync::mpsc;

use crate::is_resource_exhausted;
use crate::reconcile::diag::{self, DumpBuffer, Family, States};
use crate::reconcile::netns::{self, Found, Namespace, ThreadSearch};
use crate::reconcile::owners::OwnerCache;

use super::outbox::{Batch, Outbox, OwnerUse};
use super::{Closed, WalkerOptions, now_ns};

pub(super) struct Session {
    pub(super) options: WalkerOptions,
    pub(super) own: NetnsId,
    /// The only one to be read, if not all are. Found before the thread gives
    /// up what that takes.
    pub(super) host: Option<Namespace>,
    pub(super) threads: ThreadSearch,
    pub(super) home: File,
    pub(super) begun: sync::Receiver<()>,
    /// The walk under way is the first.
    pub(super) startup: bool,
    /// That of this audit and that of the next one: of different lengths, so
    /// that two audits in a row do not go on after the same sockets, where one
    /// deletion would hide the same socket from both.
    pub(super) buffers: [DumpBuffer; 2],
    pub(super) outbox: Outbox,
    pub(super) summary: WalkSummary,
}

/// A namespace that can be read.
pub(super) struct Entered {
    /// `None`: through `/proc`.
    pub(super) socket: Option<diag::Socket>,
    /// What a startup walk reads beside it.
    pub(super) beside: Beside,
    pub(super) ephemeral: (u16, u16),
    /// Why there is no socket, where one was wanted.
    pub(super) reason: Option<String>,
}

/// What makes sure that a startup walk skips no socket.
#[derive(Default)]
pub(super) enum Beside {
    #[default]
    Nothing,
    /// One reading by [`WalkerOptions::source`] of everything but listeners,
    /// in this namespace if it is not our own.
    Source(Option<File>),
    /// Another dump, whose union with the first is taken.
    Socket(diag::Socket),
}

pub(super) enum Entry {
    Open(Entered),
    /// It ended meanwhile.
    Gone,
    /// The agent ran out of something, descriptors mostly.
    Short(String),
    Refused(String),
}

impl Session {
    pub(super) fn new(
        options: WalkerOptions,
        sender: mpsc::Sender<WalkMessage>,
        begun: sync::Receiver<()>,
    ) -> io::Result<Self> {
        let own = options.roots.own()?;
        let host = (!options.all_netns)
            .then(|| options.roots.host_namespace())
            .transpose()?;
        let home = File::open(options.roots.proc.join("self/ns/net"))?;
        let outbox = Outbox {
            batch: Batch::new(sender, 0),
            listeners: Vec::new(),
            owners: OwnerCache::default(),
            roots: options.roots.clone(),
            owner_use: OwnerUse::None,
            wanted: States::LISTEN,
            audit: false,
        };
        Ok(Self {
            options,
            own,
            host,
            threads: ThreadSearch::default(),
            home,
            begun,
            startup: false,
            buffers: [DumpBuffer::shorter(), DumpBuffer::default()],
            outbox,
            summary: WalkSummary::default(),
        })
    }

    pub(super) fn walk(&mut self, walk: Walk) -> Result<(), Closed> {
        let (wall, cpu) = (now_ns(ClockId::Monotonic), now_ns(ClockId::ThreadCPUTime));
        self.summary = WalkSummary::default();
        if walk.audit {
            self.buffers.swap(0, 1);
        }
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
        summary.cpu_ns += now_ns(ClockId::ThreadCPUTime).saturating_sub(cpu);
        summary.owners_wait = self.outbox.owners.end_walk();
        if self.startup {
            summary.twice = self.options.source.take().is_none();
        }
        self.outbox.send(WalkMessage::End(summary))
    }

    pub(super) fn find(&mut self, search: bool) -> io::Result<Found> {
        match &self.host {
            None => (self.options.roots).find(&self.home, &mut self.threads, search),
            Some(host) => Ok(Found {
                namespaces: vec![host.clone()],
                ..Found::default()
            }),
        }
    }

    pub(super) fn namespaces(&mut self, walk: Walk, found: &Found) -> Result<(), Closed> {
        let (mut mounts, mut gone) = (Vec::new(), Vec::new());
        for namespace in &found.namespaces {
            match self.enter(namespace) {
                Entry::Open(entered) => self.read(walk, namespace, entered)?,
                Entry::Gone => gone.push(namespace),
                Entry::Short(reason) => self.unread(namespace, reason)?,
                Entry::Refused(reason) if namespace.is_mount_only() => {
                    mounts.push((namespace, reason));
                }
                Entry::Refused(reason) => self.refused(namespace, reason)?,
            }
        }
        if !gone.is_empty() {
            self.look_again(walk, &gone)?;
        }
        // A name under /run/netns that may not be entered and a process whose
        // namespace may not be read can be of the same namespace, and mostly
        // are: only names beyond what was read by a surrogate id are unread.
        // Which of them is not known, so all are named: what was not seen
        // anywhere may be in one.
        let beyond = (mounts.len() as u32).saturating_sub(self.summary.surrogates);
        for (namespace, _) in &mounts {
            self.begin(namespace, netns::DEFAULT_EPHEMERAL)?;
            self.end(namespace, Access::Unaudited, false)?;
        }
        if let (1.., Some((_, reason))) = (beyond, mounts.into_iter().next()) {
            self.unaudited(beyond, reason);
        }
        self.summary.unlisted |= found.short || found.overflow > 0;
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
    /// have begun since: looks for ways in once more.
    pub(super) fn look_again(&mut self, walk: Walk, gone: &[&Namespace]) -> Result<(), Closed> {
        let found = match self.find(false) {
            Ok(found) => found,
            Err(error) => {
                for namespace in gone {
                    self.unread(namespace, error.to_string())?;
                }
                return Ok(());
            }
        };
        for before in gone {
            let is_same =
                |now: &&Namespace| (now.id, now.surrogate) == (before.id, before.surrogate);
            let Some(now) = found.namespaces.iter().find(is_same) else {
                self.summary.unlisted |= found.short;
                continue;
            };
            match self.enter(now) {
                Entry::Open(entered) => self.read(walk, now, entered)?,
                Entry::Gone => self.unread(now, "its processes come and go".into())?,
                Entry::Short(reason) | Entry::Refused(reason) => self.unread(now, reason)?,
            }
        }
        Ok(())
    }

    /// A namespace that is there and could not be read this time.
    pub(super) fn unread(&mut self, namespace: &Namespace, reason: String) -> Result<(), Closed> {
        self.begin(namespace, netns::DEFAULT_EPHEMERAL)?;
        self.end(namespace, Access::Proc, false)?;
        self.unaudited(1, format!("network namespace {}: {reason}", namespace.id));
        Ok(())
    }

    /// A namespace that is known and nothing more.
    pub(super) fn refused(&mut self, namespace: &Namespace, reason: String) -> Result<(), Closed> {
        self.begin(namespace, netns::DEFAULT_EPHEMERAL)?;
        self.end(namespace, Access::Unaudited, false)?;
        self.unaudited(1, reason);
        Ok(())
    }

    /// Finds a way to read a namespace: sock_diag, else `/proc`.
    pub(super) fn enter(&self, namespace: &Namespace) -> Entry {
        let is_own = namespace.id == self.own && !namespace.surrogate;
        let mut reason = None;
        if is_own && self.options.force_proc {
            return self.enter_proc(namespace, netns::ephemeral_ports(), None);
        }
        if is_own {
            match self.sockets() {
                Ok(sockets) => {
                    return Entry::Open(Entered::with(sockets, netns::ephemeral_ports()));
                }
                Err(error) => reason = Some(format!("sock_diag socket: {error}")),
            }
            return self.enter_proc(namespace, netns::ephemeral_ports(), reason);
        }
        let mut ephemeral = None;
        for handle in &namespace.handles {
            let inside = || {
                let sockets = (!self.options.force_proc).then(|| self.sockets());
                (sockets, netns::ephemeral_ports())
            };
            let there = match self.options.roots.open(namespace, handle) {
                Ok(there) => there,
                Err(error) => {
                    if !is_gone(&error) {
                        reason.get_or_insert(denied(namespace, "CAP_SYS_PTRACE", &error));
                    }
                    continue;
                }
            };
            match netns::within(&there, &self.home, inside) {
                Ok((Some(Ok((socket, beside))), ports)) => {
                    let beside = match beside {
                        Beside::Source(_) => Beside::Source(Some(there)),
                        other => other,
                    };
                    return Entry::Open(Entered::with((socket, beside), ports));
                }
                Ok((Some(Err(error)), ports)) => {
                    ephemeral = Some(ports);
                    reason.get_or_insert(format!("sock_diag socket: {error}"));
                    break;
                }
                Ok((None, ports)) => {
                    ephemeral = Some(ports);
                    break;
                }
                Err(error) => {
                    reason.get_or_insert(denied(namespace, "CAP_SYS_ADMIN", &error));
                }
            }
        }
        // The range of a namespace that cannot be entered cannot be read; most
        // have the host's.
        let ephemeral = ephemeral.unwrap_or_else(netns::ephemeral_ports);
        self.enter_proc(namespace, ephemeral, reason)
    }

    /// A sock_diag socket, and what goes beside it.
    pub(super) fn sockets(&self) -> io::Result<(diag::Socket, Beside)> {
        let first = diag::Socket::open()?;
        if !self.startup {
            return Ok((first, Beside::Nothing));
        }
        if self.options.source.is_some() {
            return Ok((first, Beside::Source(None)));
        }
        let second = diag::Socket::open().map_or(Beside::Nothing, Beside::Socket);
        Ok((first, second))
    }

    pub(super) fn enter_proc(
        &self,
        namespace: &Namespace,
        ephemeral: (u16, u16),
        reason: Option<String>,
    ) -> Entry {
        match self.table(namespace, Family::V4) {
            Ok(_) => Entry::Open(Entered {
                socket: None,
                beside: Beside::Nothing,
                ephemeral,
                reason: reason.filter(|_| !self.options.force_proc),
            }),
            Err(error) if is_gone(&error) => Entry::Gone,
            Err(error) if is_resource_exhausted(&error) => Entry::Short(error.to_string()),
            Err(error) => Entry::Refused(reason.unwrap_or_else(|| error.to_string())),
        }
    }

    pub(super) fn begin(
        &mut self,
        namespace: &Namespace,
        ephemeral: (u16, u16),
    ) -> Result<(), Closed> {
        self.outbox.send(WalkMessage::NamespaceBegin {
            netns: namespace.id,
            surrogate: namespace.surrogate,
            t0_ns: now_ns(ClockId::Monotonic),
            ephemeral,
        })
    }

    pub(super) fn end(
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

    pub(super) fn unaudited(&mut self, namespaces: u32, reason: String) {
        self.summary.unaudited += namespaces;
        self.summary.reason.get_or_insert(reason);
    }
}

impl Entered {
    pub(super) fn with((socket, beside): (diag::Socket, Beside), ephemeral: (u16, u16)) -> Self {
        Self {
            socket: Some(socket),
            beside,
            ephemeral,
            reason: None,
        }
    }
}

/// Whether an error only says that a process or a namespace has ended.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

pub(super) fn denied(namespace: &Namespace, capability: &str, error: &io::Error) -> String {
    format!(
        "network namespace {}: {error}; {capability} lets it be entered",
        namespace.id
    )
}
