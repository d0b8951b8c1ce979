//! The walker: a thread of its own that reads kernel tables on command and
//! sends what it reads as [`WalkMessage`]s.
//!
//! It enters other network namespaces with setns(2), so nothing else may run
//! on it. It has to be started before the agent gives up the right to read
//! `/proc/<pid>/ns/net` (Landlock restricts the calling thread and those it
//! starts later).

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::sync::mpsc as sync;
use std::thread::JoinHandle;
use std::time::Duration;

use connmon_common::state;
use connmon_core::event::{LiveSocket, NetnsId, Owner};
use connmon_core::scan::{Access, Row, Trigger, Walk, WalkMessage, WalkSummary};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc;

use crate::is_resource_exhausted;

use super::SocketSource;
use super::diag::{self, DumpBuffer, Dumped, Family, States};
use super::netns::{self, Found, Handle, Namespace, Roots, ThreadSearch};
use super::owners::OwnerCache;
use super::procfs;

/// What holds for every walk.
pub struct WalkerOptions {
    /// Every namespace (`--netns all`), or the host's alone.
    pub all_netns: bool,
    /// Whether owners of listening sockets are looked for (`--listeners`).
    pub listeners: bool,
    /// Read `/proc` only (polling mode).
    pub force_proc: bool,
    /// For the first walk, which drops it; without one that is two dumps.
    pub source: Option<Box<dyn SocketSource>>,
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

/// The handle of the walker thread. Dropping it ends the thread after the
/// walk under way; dropping the [`WalkMessages`] breaks that one off.
#[derive(Debug)]
pub struct Walker {
    requests: sync::SyncSender<Walk>,
    thread: JoinHandle<()>,
}

/// Why a walk was not taken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// One is under way and another already waits.
    Busy,
    /// The thread is gone.
    Gone,
}

impl Walker {
    /// Starts the thread. It waits for the first request.
    ///
    /// # Errors
    /// Without a readable `/proc/self/ns/net`, or when no thread can be had.
    pub fn spawn(options: WalkerOptions) -> io::Result<(Self, WalkMessages)> {
        Self::spawn_after(options, || Ok(()))
    }

    /// Starts the thread, on which `enter` runs first (its sandbox).
    ///
    /// # Errors
    /// As [`Walker::spawn`], and what `enter` returns.
    pub fn spawn_after(
        options: WalkerOptions,
        enter: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<(Self, WalkMessages)> {
        let (requests, waiting) = sync::sync_channel(1);
        let (sender, receiver) = mpsc::channel(CHANNEL_MESSAGES);
        let (folded, begun) = sync::sync_channel(1);
        let (entered, has_entered) = sync::sync_channel(1);
        let mut session = Session::new(options, sender, begun)?;
        let thread = std::thread::Builder::new()
            .name("connmon-walker".into())
            .spawn(move || {
                let result = enter();
                let refused = result.is_err();
                if entered.send(result).is_err() || refused {
                    return;
                }
                while let Ok(walk) = waiting.recv() {
                    if session.walk(walk).is_err() {
                        return;
                    }
                }
            })?;
        has_entered.recv().map_err(io::Error::other)??;
        let messages = WalkMessages {
            receiver,
            folded,
            owed: false,
        };
        Ok((Self { requests, thread }, messages))
    }

    /// Asks for a walk; one with [`Trigger::Startup`] reads every namespace
    /// by [`WalkerOptions::source`], or without it twice, and then carries
    /// figures in pass 1 alone. Never blocks: at most one walk waits behind the one
    /// under way.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn request(&self, walk: Walk) -> Result<(), Refused> {
        self.requests.try_send(walk).map_err(|error| match error {
            sync::TrySendError::Full(_) => Refused::Busy,
            sync::TrySendError::Disconnected(_) => Refused::Gone,
        })
    }

    /// Whether the thread has ended; if nobody stopped it, it panicked.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends the thread and waits for it. Drop the [`WalkMessages`] first, or
    /// a walk under way may wait for them for ever.
    ///
    /// # Errors
    /// The payload of the thread's panic.
    pub fn join(self) -> std::thread::Result<()> {
        drop(self.requests);
        self.thread.join()
    }
}

/// The receiving end. Asking for the next message says that the last one is
/// dealt with: the walker reads no table before [`WalkMessage::Begin`] is, so
/// that every event of before the first row is folded before the walk counts
/// as begun.
#[derive(Debug)]
pub struct WalkMessages {
    receiver: mpsc::Receiver<WalkMessage>,
    folded: sync::SyncSender<()>,
    owed: bool,
}

impl WalkMessages {
    /// The next message; `None` when the thread has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<WalkMessage> {
        self.settle();
        let message = self.receiver.recv().await;
        self.take(message)
    }

    /// [`WalkMessages::next`] for a thread without an async runtime.
    pub fn blocking_next(&mut self) -> Option<WalkMessage> {
        self.settle();
        let message = self.receiver.blocking_recv();
        self.take(message)
    }

    fn settle(&mut self) {
        if std::mem::take(&mut self.owed) {
            // Room for one, and one is owed at a time; without a thread
            // there is nobody to tell.
            let _ = self.folded.try_send(());
        }
    }

    fn take(&mut self, message: Option<WalkMessage>) -> Option<WalkMessage> {
        self.owed = matches!(message, Some(WalkMessage::Begin(_)));
        message
    }
}

/// How long to rest after a walk that took `cpu_ns`, so that walks take at
/// most 0.5 % of a core.
///
/// `cpu_ns` is the whole cost: the walker's ([`WalkSummary::cpu_ns`]) and what
/// folding the rows took.
pub fn rest_after(cpu_ns: u64) -> Duration {
    Duration::from_nanos(cpu_ns.saturating_mul(WALK_SHARE))
}

/// 1 / 0.5 %.
const WALK_SHARE: u64 = 200;

/// Rows per message: enough that sending costs nothing beside the dump, few
/// enough that the fold is back at its ring within a millisecond.
pub const BATCH_ROWS: usize = 512;

/// CPU time that the first walk, whose end everybody waits for, spends on the
/// search for owners of listeners; enough for some four thousand descriptors.
/// The rest is found right after it.
const STARTUP_SEARCH: Duration = Duration::from_millis(5);

/// Messages under way, which bounds the memory between the two threads.
const CHANNEL_MESSAGES: usize = 8;

/// The receiving end is gone; so shall the thread be.
struct Closed;

struct Session {
    options: WalkerOptions,
    own: NetnsId,
    /// The only one to be read, if not all are. Found before the thread gives
    /// up what that takes.
    host: Option<Namespace>,
    threads: ThreadSearch,
    home: File,
    begun: sync::Receiver<()>,
    /// The walk under way is the first.
    startup: bool,
    /// That of this audit and that of the next one: of different lengths, so
    /// that two audits in a row do not go on after the same sockets, where one
    /// deletion would hide the same socket from both.
    buffers: [DumpBuffer; 2],
    outbox: Outbox,
    summary: WalkSummary,
}

/// A namespace that can be read.
struct Entered {
    /// `None`: through `/proc`.
    socket: Option<diag::Socket>,
    /// What a startup walk reads beside it.
    beside: Beside,
    ephemeral: (u16, u16),
    /// Why there is no socket, where one was wanted.
    reason: Option<String>,
}

/// What makes sure that a startup walk skips no socket.
#[derive(Default)]
enum Beside {
    #[default]
    Nothing,
    /// One reading by [`WalkerOptions::source`] of everything but listeners,
    /// in this namespace if it is not our own.
    Source(Option<File>),
    /// Another dump, whose union with the first is taken.
    Socket(diag::Socket),
}

enum Entry {
    Open(Entered),
    /// It ended meanwhile.
    Gone,
    /// The agent ran out of something, descriptors mostly.
    Short(String),
    Refused(String),
}

impl Session {
    fn new(
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

    fn walk(&mut self, walk: Walk) -> Result<(), Closed> {
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

    fn find(&mut self, search: bool) -> io::Result<Found> {
        match &self.host {
            None => (self.options.roots).find(&self.home, &mut self.threads, search),
            Some(host) => Ok(Found {
                namespaces: vec![host.clone()],
                ..Found::default()
            }),
        }
    }

    fn namespaces(&mut self, walk: Walk, found: &Found) -> Result<(), Closed> {
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
        // are: only names beyond what was read by a stand-in are unread.
        // Which of them is not known, so all are named: what was not seen
        // anywhere may be in one.
        let beyond = (mounts.len() as u32).saturating_sub(self.summary.stand_ins);
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
    fn look_again(&mut self, walk: Walk, gone: &[&Namespace]) -> Result<(), Closed> {
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
            let is_same = |now: &&Namespace| (now.id, now.stand_in) == (before.id, before.stand_in);
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
    fn unread(&mut self, namespace: &Namespace, reason: String) -> Result<(), Closed> {
        self.begin(namespace, netns::DEFAULT_EPHEMERAL)?;
        self.end(namespace, Access::Proc, false)?;
        self.unaudited(1, format!("network namespace {}: {reason}", namespace.id));
        Ok(())
    }

    /// A namespace that is known and nothing more.
    fn refused(&mut self, namespace: &Namespace, reason: String) -> Result<(), Closed> {
        self.begin(namespace, netns::DEFAULT_EPHEMERAL)?;
        self.end(namespace, Access::Unaudited, false)?;
        self.unaudited(1, reason);
        Ok(())
    }

    /// Finds a way to read a namespace: sock_diag, else `/proc`.
    fn enter(&self, namespace: &Namespace) -> Entry {
        let is_own = namespace.id == self.own && !namespace.stand_in;
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
    fn sockets(&self) -> io::Result<(diag::Socket, Beside)> {
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

    fn enter_proc(
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

    fn read(
        &mut self,
        walk: Walk,
        namespace: &Namespace,
        mut entered: Entered,
    ) -> Result<(), Closed> {
        self.begin(namespace, entered.ephemeral)?;
        let beside = std::mem::take(&mut entered.beside);
        let (access, complete) = match beside {
            _ if !self.startup => self.pass(namespace, &mut entered, 0, walk.traffic)?,
            Beside::Source(there) => self.by_source(walk, namespace, &mut entered, there)?,
            Beside::Socket(second) => self.both_passes(walk, namespace, &mut entered, second)?,
            Beside::Nothing => {
                let (_, first) = self.pass(namespace, &mut entered, 0, false)?;
                let (access, second) = self.pass(namespace, &mut entered, 1, walk.traffic)?;
                (access, first && second)
            }
        };
        self.end(namespace, access, complete)?;
        match access {
            Access::Diag => self.summary.diag += 1,
            Access::Proc | Access::Unaudited => self.summary.proc += 1,
        }
        self.summary.stand_ins += u32::from(namespace.stand_in);
        if let (None, Some(reason)) = (&self.summary.reason, entered.reason) {
            self.summary.reason = Some(reason);
        }
        Ok(())
    }

    /// Listeners by sock_diag, which knows them by inode and has their queues,
    /// and everything else by the source.
    fn by_source(
        &mut self,
        walk: Walk,
        namespace: &Namespace,
        entered: &mut Entered,
        there: Option<File>,
    ) -> Result<(Access, bool), Closed> {
        let wanted = std::mem::replace(&mut self.outbox.wanted, States::LISTEN);
        let listeners = self.pass(namespace, entered, 0, false);
        self.outbox.wanted = wanted;
        let (access, complete) = listeners?;
        let outbox = &mut self.outbox;
        let mut shown = false;
        let source = self.options.source.as_mut();
        let read = || match source {
            Some(source) => source.read(&mut |socket| {
                shown = true;
                let row = row_of(socket, walk.traffic);
                outbox.push(row).is_ok()
            }),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        let ended = match there {
            None => read(),
            Some(there) => netns::within(&there, &self.home, read).and_then(|ended| ended),
        };
        self.outbox.flush()?;
        match ended {
            Ok(true) => Ok((access, complete)),
            Ok(false) => Err(Closed),
            Err(error) => {
                log::debug!(
                    "network namespace {}: {error}; two dumps instead",
                    namespace.id
                );
                // What was shown counts already; listeners do in any case.
                self.outbox.wanted = States::OPENING.and(States::OPEN);
                let first = self.pass(namespace, entered, u8::from(shown), false);
                self.outbox.wanted = wanted;
                let (_, first) = first?;
                let (access, second) = self.pass(namespace, entered, 1, walk.traffic)?;
                Ok((access, first && second))
            }
        }
    }

    /// Both passes of a startup walk at the same time: a dump is made by the
    /// thread that reads it, so two take no longer than one where a second
    /// processor is idle.
    fn both_passes(
        &mut self,
        walk: Walk,
        namespace: &Namespace,
        entered: &mut Entered,
        mut socket: diag::Socket,
    ) -> Result<(Access, bool), Closed> {
        let batch = Batch::new(self.outbox.batch.sender.clone(), 1);
        let wanted = self.outbox.wanted;
        std::thread::scope(|scope| {
            let spawned = std::thread::Builder::new()
                .name("connmon-walker2".into())
                .spawn_scoped(scope, move || {
                    second_pass(&mut socket, batch, wanted, walk.traffic)
                });
            let (mut access, mut complete) = self.pass(namespace, entered, 0, false)?;
            let second = match spawned {
                Ok(thread) => thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(_) => Ok(Outcome::Refused),
            };
            match second? {
                Outcome::Read {
                    complete: whole,
                    undecodable,
                    cpu_ns,
                } => {
                    complete &= whole;
                    self.summary.undecodable += undecodable;
                    self.summary.cpu_ns += cpu_ns;
                }
                // No thread to be had, or no such dump: one after the other.
                Outcome::Refused => {
                    let whole;
                    (access, whole) = self.pass(namespace, entered, 1, walk.traffic)?;
                    complete &= whole;
                }
            }
            Ok((access, complete))
        })
    }

    /// Reads both families once.
    fn pass(
        &mut self,
        namespace: &Namespace,
        entered: &mut Entered,
        pass: u8,
        figures: bool,
    ) -> Result<(Access, bool), Closed> {
        self.outbox.batch.pass = pass;
        let (mut access, mut complete) = (Access::Diag, true);
        let mut listeners = HashSet::new();
        if let Some(socket) = &mut entered.socket {
            let dumped = socket.dump_both(
                self.outbox.wanted,
                figures,
                &mut self.buffers[0],
                &mut self.summary.undecodable,
                |row| self.outbox.push(row).is_ok(),
            );
            match dumped {
                Dumped::Complete | Dumped::Partial(_) => {
                    if let Dumped::Partial(why) = dumped {
                        log::debug!("network namespace {}: {why}", namespace.id);
                        complete = false;
                    }
                    self.outbox.flush()?;
                    return Ok((access, complete));
                }
                Dumped::Stopped => return Err(Closed),
                // One family after the other then.
                Dumped::Refused(_) => {}
            }
        }
        for family in Family::ALL {
            if let Some(socket) = &mut entered.socket {
                let dumped = socket.dump(
                    family,
                    self.outbox.wanted,
                    figures,
                    &mut self.buffers[0],
                    &mut self.summary.undecodable,
                    |row| self.outbox.push(row).is_ok(),
                );
                match dumped {
                    Dumped::Complete => continue,
                    Dumped::Stopped => return Err(Closed),
                    Dumped::Partial(why) => {
                        log::debug!("network namespace {}: {why}", namespace.id);
                        complete = false;
                        continue;
                    }
                    Dumped::Refused(error) => {
                        entered.reason.get_or_insert_with(|| {
                            format!(
                                "sock_diag for {}: {error}; the kernel module tcp_diag provides it",
                                family.proc_file()
                            )
                        });
                        if family == Family::V4 {
                            entered.socket = None;
                        }
                    }
                }
            }
            // A kernel without IPv6 refuses that family, has no table of it
            // either, and nothing is missing.
            if self.read_table(namespace, family, false, &mut listeners, &mut complete)? {
                access = Access::Proc;
            }
        }
        if self.options.force_proc && self.outbox.audit {
            // Listeners that began after theirs were read, and before one of
            // their connections was.
            for family in Family::ALL {
                self.read_table(namespace, family, true, &mut listeners, &mut complete)?;
            }
        }
        self.outbox.flush()?;
        Ok((access, complete))
    }

    /// Reads one table of `/proc`, or of it the listening sockets that are not
    /// among `listeners` (by inode); false when there is none.
    fn read_table(
        &mut self,
        namespace: &Namespace,
        family: Family,
        new_listeners: bool,
        listeners: &mut HashSet<u32>,
        complete: &mut bool,
    ) -> Result<bool, Closed> {
        let file = match self.table(namespace, family) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(false),
            Err(error) => {
                log::debug!("network namespace {}: {error}", namespace.id);
                *complete = false;
                return Ok(true);
            }
        };
        let before = self.summary.undecodable;
        let mut closed = false;
        // There are no figures in /proc for a traffic sample.
        let listeners_only =
            new_listeners || !self.outbox.audit || self.outbox.wanted == States::LISTEN;
        let read = procfs::read_table(file, &mut self.summary.undecodable, |row| {
            // Listeners come first in every table.
            if listeners_only && row.state != state::LISTEN {
                return false;
            }
            if row.state == state::LISTEN && !listeners.insert(row.inode) && new_listeners {
                return true;
            }
            closed = self.outbox.push(row).is_err();
            !closed
        });
        if closed {
            return Err(Closed);
        }
        if let Err(error) = read {
            log::debug!("network namespace {}: {error}", namespace.id);
            *complete = false;
        }
        *complete &= self.summary.undecodable == before;
        Ok(true)
    }

    /// Opens a table by whichever handle still works.
    fn table(&self, namespace: &Namespace, family: Family) -> io::Result<Option<File>> {
        let mut failed = io::Error::from(io::ErrorKind::NotFound);
        for handle in &namespace.handles {
            let opened = match handle {
                Handle::Mount(_) => self
                    .options
                    .roots
                    .open(namespace, handle)
                    .and_then(|there| {
                        netns::within(&there, &self.home, || {
                            self.options.roots.open_own_table(family)
                        })?
                    }),
                _ => self.options.roots.open_table(namespace, handle, family),
            };
            match opened {
                Ok(table) => return Ok(table),
                Err(error) if is_gone(&error) => {}
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    fn begin(&mut self, namespace: &Namespace, ephemeral: (u16, u16)) -> Result<(), Closed> {
        self.outbox.send(WalkMessage::NamespaceBegin {
            netns: namespace.id,
            stand_in: namespace.stand_in,
            t0_ns: now_ns(ClockId::Monotonic),
            ephemeral,
        })
    }

    fn end(&mut self, namespace: &Namespace, access: Access, complete: bool) -> Result<(), Closed> {
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

impl Entered {
    fn with((socket, beside): (diag::Socket, Beside), ephemeral: (u16, u16)) -> Self {
        Self {
            socket: Some(socket),
            beside,
            ephemeral,
            reason: None,
        }
    }
}

/// Inode and queues are of use for listeners only, of which a source has none.
fn row_of(socket: LiveSocket, figures: bool) -> Row {
    let figures = figures && States::OPEN.has(socket.state);
    Row {
        state: socket.state,
        tuple: socket.tuple,
        id: socket.id,
        cookie: socket.cookie,
        inode: 0,
        receive_queue: 0,
        send_queue: 0,
        traffic: socket.traffic.filter(|_| figures),
        owner: Owner::default(),
    }
}

/// How the second pass of a startup walk ended.
enum Outcome {
    Read {
        complete: bool,
        undecodable: u64,
        cpu_ns: u64,
    },
    /// sock_diag does not do it.
    Refused,
}

/// The second pass of a startup walk, on a thread of its own. Its buffer is
/// another, so that both dumps do not go on after the same sockets, where one
/// deletion would hide the same socket from both.
fn second_pass(
    socket: &mut diag::Socket,
    mut batch: Batch,
    wanted: States,
    figures: bool,
) -> Result<Outcome, Closed> {
    let cpu = now_ns(ClockId::ThreadCPUTime);
    let mut undecodable = 0;
    let dumped = socket.dump_both(
        wanted,
        figures,
        &mut DumpBuffer::shorter(),
        &mut undecodable,
        |row| batch.push(row).is_ok(),
    );
    batch.flush()?;
    let complete = match dumped {
        Dumped::Complete => true,
        Dumped::Stopped => return Err(Closed),
        Dumped::Partial(why) => {
            log::debug!("second pass: {why}");
            false
        }
        Dumped::Refused(_) => return Ok(Outcome::Refused),
    };
    Ok(Outcome::Read {
        complete,
        undecodable,
        cpu_ns: now_ns(ClockId::ThreadCPUTime).saturating_sub(cpu),
    })
}

/// Rows on their way out, a message at a time.
struct Batch {
    sender: mpsc::Sender<WalkMessage>,
    pass: u8,
    rows: Vec<Row>,
}

impl Batch {
    fn new(sender: mpsc::Sender<WalkMessage>, pass: u8) -> Self {
        Self {
            sender,
            pass,
            rows: Vec::new(),
        }
    }

    fn push(&mut self, row: Row) -> Result<(), Closed> {
        if self.rows.capacity() == 0 {
            self.rows.reserve_exact(BATCH_ROWS);
        }
        self.rows.push(row);
        if self.rows.len() == BATCH_ROWS {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Closed> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let rows = std::mem::take(&mut self.rows);
        self.send(WalkMessage::Rows {
            pass: self.pass,
            rows,
        })
    }

    fn send(&self, message: WalkMessage) -> Result<(), Closed> {
        self.sender.blocking_send(message).map_err(|_| Closed)
    }
}

/// What a walk says, listeners with their owners.
struct Outbox {
    batch: Batch,
    /// Listeners whose owners are still to be found, all at once.
    listeners: Vec<Row>,
    owners: OwnerCache,
    roots: Roots,
    owner_use: OwnerUse,
    wanted: States,
    audit: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum OwnerUse {
    /// `--listeners off`.
    None,
    /// Only what is known: samples between audits look nothing up.
    Cached,
    /// Find what is not known.
    Search,
}

impl Outbox {
    fn begin_walk(&mut self, walk: Walk, listeners: bool) {
        self.wanted = match (walk.audit, walk.traffic) {
            (true, _) => States::LISTEN.and(States::OPENING).and(States::OPEN),
            (false, true) => States::LISTEN.and(States::OPEN),
            (false, false) => States::LISTEN,
        };
        self.owner_use = match (listeners, walk.audit, walk.traffic) {
            (false, ..) => OwnerUse::None,
            (true, false, true) => OwnerUse::Cached,
            (true, true, _) | (true, false, false) => OwnerUse::Search,
        };
        self.audit = walk.audit;
        match (walk.audit, walk.trigger) {
            (true, Trigger::Startup) => self.owners.begin_walk(Some(STARTUP_SEARCH)),
            (true, _) => self.owners.begin_walk(None),
            (false, _) => self.owners.go_on(),
        }
    }

    /// Takes a row if this walk wants it.
    fn push(&mut self, mut row: Row) -> Result<(), Closed> {
        if row.state == state::LISTEN {
            match self.owner_use {
                OwnerUse::None => {}
                OwnerUse::Cached => row.owner = self.owners.cached(row.inode),
                OwnerUse::Search => {
                    self.listeners.push(row);
                    if self.listeners.len() == BATCH_ROWS {
                        self.find_owners()?;
                    }
                    return Ok(());
                }
            }
        } else if !self.listeners.is_empty() {
            // So that listeners stay ahead of what they accepted.
            self.find_owners()?;
        }
        if self.wanted.has(row.state) {
            self.batch.push(row)
        } else {
            Ok(())
        }
    }

    fn find_owners(&mut self) -> Result<(), Closed> {
        let listeners = std::mem::take(&mut self.listeners);
        let inodes: Vec<u32> = listeners.iter().map(|row| row.inode).collect();
        let owners = self.owners.owners(&self.roots, &inodes);
        for (row, owner) in listeners.into_iter().zip(owners) {
            self.batch.push(Row { owner, ..row })?;
        }
        Ok(())
    }

    /// Sends whatever waits: the end of a pass.
    fn flush(&mut self) -> Result<(), Closed> {
        if !self.listeners.is_empty() {
            self.find_owners()?;
        }
        self.batch.flush()
    }

    fn send(&self, message: WalkMessage) -> Result<(), Closed> {
        self.batch.send(message)
    }
}

/// Whether an error only says that a process or a namespace has ended.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn denied(namespace: &Namespace, capability: &str, error: &io::Error) -> String {
    format!(
        "network namespace {}: {error}; {capability} lets it be entered",
        namespace.id
    )
}

pub(super) fn now_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    // Neither clock is ever negative.
    (now.tv_sec as u64) * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::BTreeSet;
    use std::net::Ipv4Addr;

    use connmon_core::event::{Traffic, Tuple};

    /// A tree like `/proc` whose namespace 9 has process 5, and a walker in it.
    fn tree() -> (tempfile::TempDir, Session, mpsc::Receiver<WalkMessage>) {
        let tree = tempfile::tempdir().unwrap();
        for (process, netns) in [("self", 7), ("5", 9), ("6", 10)] {
            let dir = tree.path().join(process);
            std::fs::create_dir_all(dir.join("ns")).unwrap();
            std::fs::create_dir_all(dir.join("net")).unwrap();
            let link = format!("net:[{netns}]");
            std::os::unix::fs::symlink(&link, dir.join("ns/net")).unwrap();
            if netns != 10 {
                std::fs::write(dir.join("ns").join(link), "").unwrap();
                std::fs::write(
                    dir.join("net/tcp"),
                    "  sl  local_address rem_address   st\n",
                )
                .unwrap();
            }
        }
        let options = WalkerOptions {
            force_proc: true,
            roots: Roots {
                proc: tree.path().into(),
                mounts: Vec::new(),
            },
            ..WalkerOptions::default()
        };
        let (sender, receiver) = mpsc::channel(64);
        let (_, begun) = sync::sync_channel(1);
        (
            tree,
            Session::new(options, sender, begun).ok().unwrap(),
            receiver,
        )
    }

    #[test]
    fn a_namespace_whose_processes_ended_is_looked_for_again() {
        let (_tree, mut session, mut messages) = tree();
        let walk = Walk {
            trigger: Trigger::Interval,
            traffic: false,
            audit: true,
        };
        let found = Found {
            // 9 has another process by now, 10 has one that is ending, and 11
            // has none.
            namespaces: [9, 10, 11]
                .map(|id| Namespace {
                    id,
                    stand_in: false,
                    table: None,
                    handles: vec![Handle::Process(1_000)],
                })
                .to_vec(),
            ..Found::default()
        };
        assert!(session.namespaces(walk, &found).is_ok());
        assert_eq!(ends(&mut messages), [(9, true), (10, false)]);
        assert_eq!(session.summary.unaudited, 1);
    }

    /// Shows a connection and a handshake, or nothing, and ends so.
    #[derive(Debug)]
    struct Scripted {
        shows: bool,
        breaks: bool,
    }

    const SHOWN: u64 = u64::MAX - 7;

    impl SocketSource for Scripted {
        fn read(&mut self, sink: &mut dyn FnMut(LiveSocket) -> bool) -> io::Result<bool> {
            let states = [state::SYN_SENT, state::ESTABLISHED];
            for state in states.into_iter().filter(|_| self.shows) {
                let end = (Ipv4Addr::LOCALHOST.into(), 9);
                let shown = sink(LiveSocket {
                    state,
                    id: SHOWN,
                    cookie: SHOWN,
                    tuple: Tuple {
                        local: end.0,
                        local_port: end.1,
                        remote: end.0,
                        remote_port: end.1,
                    },
                    traffic: Some(Traffic::default()),
                });
                assert!(shown);
            }
            match self.breaks {
                true => Err(io::ErrorKind::PermissionDenied.into()),
                false => Ok(true),
            }
        }
    }

    /// Passes in which rows came, and whether of open connections.
    type Passes = BTreeSet<(u8, bool)>;

    /// Those of a first walk of our own namespace, what the source showed in
    /// it, and whether it is complete.
    fn first_walk(source: Scripted) -> (Passes, Vec<(u8, Row)>, bool) {
        let (_tree, mut session, mut messages) = tree();
        let walk = Walk {
            trigger: Trigger::Startup,
            traffic: true,
            audit: true,
        };
        let (mut passes, mut shown, mut whole) = (BTreeSet::new(), Vec::new(), false);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                session.options.force_proc = false;
                session.options.source = Some(Box::new(source));
                session.startup = true;
                session.outbox.begin_walk(walk, false);
                let own = Namespace {
                    id: 7,
                    stand_in: false,
                    table: None,
                    handles: Vec::new(),
                };
                let Entry::Open(entered) = session.enter(&own) else {
                    panic!("our own namespace is closed to us");
                };
                assert!(session.read(walk, &own, entered).is_ok());
            });
            while let Some(message) = messages.blocking_recv() {
                match message {
                    WalkMessage::Rows { pass, rows } => {
                        passes.extend(rows.iter().map(|row| (pass, States::OPEN.has(row.state))));
                        let rows = rows.into_iter().filter(|row| row.cookie == SHOWN);
                        shown.extend(rows.map(|row| (pass, row)));
                    }
                    WalkMessage::NamespaceEnd { complete, .. } => whole = complete,
                    _ => {}
                }
            }
        });
        (passes, shown, whole)
    }

    #[test]
    fn a_source_makes_a_second_pass_needless() {
        let (passes, shown, whole) = first_walk(Scripted {
            shows: true,
            breaks: false,
        });
        assert!(whole && passes.iter().all(|(pass, _)| *pass == 0));
        let seen = shown
            .iter()
            .map(|(pass, row)| (*pass, row.state, row.traffic.is_some()));
        // No figures before a connection is open, as in a dump.
        let expected = [(0, state::SYN_SENT, false), (0, state::ESTABLISHED, true)];
        assert!(seen.eq(expected), "{shown:?}");
    }

    #[test]
    fn what_a_source_breaks_off_two_dumps_make_good() {
        // So that the dumps have something to show.
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        for shows in [true, false] {
            let source = Scripted {
                shows,
                breaks: true,
            };
            let (passes, shown, whole) = first_walk(source);
            // Rows count in pass 0, and each socket is to count once.
            let first: BTreeSet<bool> = passes
                .iter()
                .filter(|(pass, _)| *pass == 0)
                .map(|(_, is_open)| *is_open)
                .collect();
            assert!(first.contains(&true), "{passes:?}");
            assert!(passes.contains(&(1, true)) && whole);
            assert_eq!(shown.len(), if shows { 2 } else { 0 });
        }
    }

    #[test]
    fn the_host_of_the_start_is_read_when_its_link_cannot_be_any_more() {
        let (tree, session, _) = tree();
        let first = tree.path().join("1");
        for part in ["ns", "net"] {
            std::fs::create_dir_all(first.join(part)).unwrap();
        }
        std::os::unix::fs::symlink("net:[9]", first.join("ns/net")).unwrap();
        std::fs::copy(tree.path().join("5/net/tcp"), first.join("net/tcp")).unwrap();
        let options = WalkerOptions {
            all_netns: false,
            ..session.options
        };
        let (sender, mut messages) = mpsc::channel(64);
        let (_, begun) = sync::sync_channel(1);
        let mut session = Session::new(options, sender, begun).ok().unwrap();
        std::fs::remove_file(first.join("ns/net")).unwrap();
        let walk = Walk {
            trigger: Trigger::Interval,
            traffic: false,
            audit: true,
        };
        let found = session.find(true).unwrap();
        assert!(session.namespaces(walk, &found).is_ok());
        assert_eq!(ends(&mut messages), [(9, true)]);
    }

    /// Which namespaces a walk named, and whether it read all of them.
    fn ends(messages: &mut mpsc::Receiver<WalkMessage>) -> Vec<(NetnsId, bool)> {
        let mut ends = Vec::new();
        while let Ok(message) = messages.try_recv() {
            if let WalkMessage::NamespaceEnd {
                netns, complete, ..
            } = message
            {
                ends.push((netns, complete));
            }
        }
        ends
    }

    #[test]
    fn walks_take_half_a_percent() {
        assert_eq!(rest_after(0), Duration::ZERO);
        assert_eq!(rest_after(1_000_000_000), Duration::from_secs(200));
        assert!(rest_after(u64::MAX) > Duration::from_secs(200));
    }
}
