//! Reads the socket tables of one namespace: by sock_diag, by the scan of the
//! kernel's table, or from /proc.

use std::collections::HashSet;
use std::fs::File;
use std::io;

use connmon_common::state;
use connmon_core::event::{LiveSocket, Owner};
use connmon_core::scan::{Access, Row, Walk};
use rustix::time::ClockId;

use crate::reconcile::diag::{self, DumpBuffer, Dumped, Family, States};
use crate::reconcile::netns::{self, Handle, Namespace};
use crate::reconcile::procfs;

use super::outbox::Batch;
use super::session::{Beside, Entered, Session, is_gone};
use super::{Closed, now_ns};

impl Session {
    pub(super) fn read(
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
        self.summary.surrogates += u32::from(namespace.surrogate);
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
        stats: bool,
    ) -> Result<(Access, bool), Closed> {
        self.outbox.batch.pass = pass;
        let (mut access, mut complete) = (Access::Diag, true);
        let mut listeners = HashSet::new();
        if let Some(socket) = &mut entered.socket {
            let dumped = socket.dump_both(
                self.outbox.wanted,
                stats,
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
                    stats,
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
    pub(super) fn table(&self, namespace: &Namespace, family: Family) -> io::Result<Option<File>> {
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
}

/// Inode and queues are of use for listeners only, of which a source has none.
fn row_of(socket: LiveSocket, stats: bool) -> Row {
    let stats = stats && States::OPEN.has(socket.state);
    Row {
        state: socket.state,
        tuple: socket.tuple,
        id: socket.id,
        cookie: socket.cookie,
        inode: 0,
        receive_queue: 0,
        send_queue: 0,
        traffic: socket.traffic.filter(|_| stats),
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
    stats: bool,
) -> Result<Outcome, Closed> {
    let cpu = now_ns(ClockId::ThreadCPUTime);
    let mut undecodable = 0;
    let dumped = socket.dump_both(
        wanted,
        stats,
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
