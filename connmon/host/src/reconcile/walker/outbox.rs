//! What a walk sends: rows in batches, listeners with their owners.

use std::time::Duration;

use connmon_common::state;
use connmon_core::scan::{Row, Trigger, Walk, WalkMessage};
use tokio::sync::mpsc;

use crate::reconcile::diag::States;
use crate::reconcile::netns::Roots;
use crate::reconcile::owners::OwnerCache;

use super::{BATCH_ROWS, Closed};

/// CPU time that the first walk, whose end everybody waits for, spends on the
/// search for owners of listeners; enough for some four thousand descriptors.
/// The rest is found right after it.
const STARTUP_SEARCH: Duration = Duration::from_millis(5);

/// Rows on their way out, a message at a time.
pub(super) struct Batch {
    pub(super) sender: mpsc::Sender<WalkMessage>,
    pub(super) pass: u8,
    pub(super) rows: Vec<Row>,
}

impl Batch {
    pub(super) fn new(sender: mpsc::Sender<WalkMessage>, pass: u8) -> Self {
        Self {
            sender,
            pass,
            rows: Vec::new(),
        }
    }

    pub(super) fn push(&mut self, row: Row) -> Result<(), Closed> {
        if self.rows.capacity() == 0 {
            self.rows.reserve_exact(BATCH_ROWS);
        }
        self.rows.push(row);
        if self.rows.len() == BATCH_ROWS {
            self.flush()?;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<(), Closed> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let rows = std::mem::take(&mut self.rows);
        self.send(WalkMessage::Rows {
            pass: self.pass,
            rows,
        })
    }

    pub(super) fn send(&self, message: WalkMessage) -> Result<(), Closed> {
        self.sender.blocking_send(message).map_err(|_| Closed)
    }
}

/// What a walk says, listeners with their owners.
pub(super) struct Outbox {
    pub(super) batch: Batch,
    /// Listeners whose owners are still to be found, all at once.
    pub(super) listeners: Vec<Row>,
    pub(super) owners: OwnerCache,
    pub(super) roots: Roots,
    pub(super) owner_use: OwnerUse,
    pub(super) wanted: States,
    pub(super) audit: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum OwnerUse {
    /// `--listeners off`.
    None,
    /// Only what is known: samples between audits look nothing up.
    Cached,
    /// Find what is not known.
    Search,
}

impl Outbox {
    pub(super) fn begin_walk(&mut self, walk: Walk, listeners: bool) {
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
    pub(super) fn push(&mut self, mut row: Row) -> Result<(), Closed> {
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

    pub(super) fn find_owners(&mut self) -> Result<(), Closed> {
        let listeners = std::mem::take(&mut self.listeners);
        let inodes: Vec<u32> = listeners.iter().map(|row| row.inode).collect();
        let owners = self.owners.owners(&self.roots, &inodes);
        for (row, owner) in listeners.into_iter().zip(owners) {
            self.batch.push(Row { owner, ..row })?;
        }
        Ok(())
    }

    /// Sends whatever waits: the end of a pass.
    pub(super) fn flush(&mut self) -> Result<(), Closed> {
        if !self.listeners.is_empty() {
            self.find_owners()?;
        }
        self.batch.flush()
    }

    pub(super) fn send(&self, message: WalkMessage) -> Result<(), Closed> {
        self.batch.send(message)
    }
}
