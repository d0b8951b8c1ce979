//! Reads the sockets of one namespace: by sock_diag, by the scan of the kernel's
//! table, or from /proc.

use std::collections::HashSet;
use std::fs::File;
use std::io;

use connmon_common::state;
use connmon_core::event::LiveSocket;
use connmon_core::scan::{Access, Row, Walk};

use super::outbox::Closed;
use super::session::{Entered, Session, is_gone};
use crate::reconcile::diag::{Dumped, States};
use crate::reconcile::netns::{self, Namespace};
use crate::reconcile::parsed::bare_row;
use crate::reconcile::procfs::{self, Family};

impl Session {
    pub fn read(
        &mut self,
        walk: Walk,
        namespace: &Namespace,
        mut entered: Entered,
    ) -> Result<(), Closed> {
        self.begin(namespace, entered.ephemeral)?;
        // The shorter one first: the kernel fills the longest buffer that a
        // socket ever had (`netlink_recvmsg`).
        self.longer &= !self.startup;
        let by_scan = entered.socket.is_some() && self.options.source.is_some();
        match (self.startup, by_scan) {
            (false, _) => self.pass(namespace, &mut entered, 0, walk.traffic)?,
            (true, true) => self.scan(walk, namespace, &mut entered)?,
            (true, false) => self.two_passes(walk, namespace, &mut entered, 0)?,
        }
        self.end(namespace, entered.access, entered.complete)?;
        match entered.access {
            Access::Diag => self.summary.diag += 1,
            Access::Proc | Access::Unaudited => self.summary.proc += 1,
        }
        self.summary.surrogates += u32::from(namespace.surrogate);
        if self.summary.reason.is_none() {
            self.summary.reason = entered.reason;
        }
        Ok(())
    }

    /// Reads listeners by sock_diag, which has their inodes and queues, and
    /// everything else by the scan. Where that breaks off, two passes follow.
    fn scan(
        &mut self,
        walk: Walk,
        namespace: &Namespace,
        entered: &mut Entered,
    ) -> Result<(), Closed> {
        let all = std::mem::replace(&mut self.outbox.wanted, States::LISTEN);
        self.pass(namespace, entered, 0, false)?;
        let outbox = &mut self.outbox;
        outbox.wanted = all;
        let mut shown = false;
        let source = self.options.source.as_mut();
        let scan = || match source {
            Some(source) => source(&mut |socket| {
                shown = true;
                outbox.push(row_of(socket, walk.traffic)).is_ok()
            }),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        let ended = match &entered.there {
            None => scan(),
            Some(there) => netns::within(there, &self.home, scan).flatten(),
        };
        self.outbox.flush()?;
        match ended {
            Ok(true) => Ok(()),
            Ok(false) => Err(Closed),
            Err(error) => {
                let id = namespace.id;
                log::debug!("network namespace {id}: socket-table scan: {error}; dumped twice");
                // Listeners are known, and what the scan delivered counts
                // already.
                self.outbox.wanted = States::OPENING.and(States::OPEN);
                self.two_passes(walk, namespace, entered, u8::from(shown))?;
                self.outbox.wanted = all;
                Ok(())
            }
        }
    }

    /// Reads everything twice, since a dump may skip a socket that is there;
    /// the fold takes the union. Only the second has traffic counters.
    fn two_passes(
        &mut self,
        walk: Walk,
        namespace: &Namespace,
        entered: &mut Entered,
        first: u8,
    ) -> Result<(), Closed> {
        self.pass(namespace, entered, first, false)?;
        self.longer = true;
        self.pass(namespace, entered, 1, walk.traffic)
    }

    /// Reads IPv4 and IPv6 once, by sock_diag or else from /proc.
    fn pass(
        &mut self,
        namespace: &Namespace,
        entered: &mut Entered,
        pass: u8,
        traffic: bool,
    ) -> Result<(), Closed> {
        let outbox = &mut self.outbox;
        outbox.pass = pass;
        if let Some(socket) = &mut entered.socket {
            let dumped = socket.dump(
                outbox.wanted,
                traffic,
                &mut self.buffers[usize::from(self.longer)],
                &mut self.summary.undecodable,
                |row| outbox.push(row).is_ok(),
            );
            match dumped {
                Dumped::Complete => return outbox.flush(),
                Dumped::Partial(why) => {
                    log::debug!("network namespace {}: {why}", namespace.id);
                    entered.complete = false;
                    return outbox.flush();
                }
                Dumped::Stopped => return Err(Closed),
                Dumped::Refused(error) => {
                    entered.reason.get_or_insert_with(|| {
                        format!("sock_diag: {error}; the kernel module tcp_diag provides it")
                    });
                    entered.socket = None;
                }
            }
        }
        entered.access = Access::Proc;
        let mut listeners = HashSet::new();
        for family in Family::ALL {
            entered.complete &= self.read_table(namespace, family, false, &mut listeners)?;
        }
        if self.options.force_proc && self.outbox.audit {
            // Listeners that began after theirs were read, and before one of
            // their connections was.
            for family in Family::ALL {
                entered.complete &= self.read_table(namespace, family, true, &mut listeners)?;
            }
        }
        self.outbox.flush()
    }

    /// Reads one table of `/proc`, or of it the listening sockets that are not
    /// among `listeners` (by inode). False when some of it could not be read.
    fn read_table(
        &mut self,
        namespace: &Namespace,
        family: Family,
        new_listeners: bool,
        listeners: &mut HashSet<u32>,
    ) -> Result<bool, Closed> {
        let undecodable = self.summary.undecodable;
        // There are no counters in /proc for a traffic sample.
        let listeners_only =
            new_listeners || !self.outbox.audit || self.outbox.wanted == States::LISTEN;
        let mut closed = false;
        let read = match self.table(namespace, family) {
            Ok(None) => return Ok(true),
            Ok(Some(file)) => procfs::read_table(file, &mut self.summary.undecodable, |row| {
                // Listeners come first in every table.
                if listeners_only && row.state != state::LISTEN {
                    return false;
                }
                if row.state == state::LISTEN && !listeners.insert(row.inode) && new_listeners {
                    return true;
                }
                closed = self.outbox.push(row).is_err();
                !closed
            }),
            Err(error) => Err(error),
        };
        if closed {
            return Err(Closed);
        }
        if let Err(error) = &read {
            log::debug!("network namespace {}: {error}", namespace.id);
        }
        Ok(read.is_ok() && self.summary.undecodable == undecodable)
    }

    /// Opens a table by whichever handle still works.
    pub fn table(&self, namespace: &Namespace, family: Family) -> io::Result<Option<File>> {
        let mut failed = io::Error::from(io::ErrorKind::NotFound);
        for handle in &namespace.handles {
            let roots = &self.options.roots;
            match roots.open_table(namespace, handle, family, &self.home) {
                Ok(table) => return Ok(table),
                Err(error) if is_gone(&error) => {}
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }
}

/// Traffic only of open connections, as in a dump.
fn row_of(socket: LiveSocket, traffic: bool) -> Row {
    let traffic = traffic && States::OPEN.has(socket.state);
    Row {
        id: socket.id,
        cookie: socket.cookie,
        traffic: socket.traffic.filter(|_| traffic),
        ..bare_row(socket.state, socket.tuple)
    }
}
