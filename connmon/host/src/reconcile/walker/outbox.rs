//! What a walk sends: rows in batches, listeners with their owners.

use std::time::Duration;

use connmon_common::state;
use connmon_core::scan::{Row, Trigger, Walk, WalkMessage};
use tokio::sync::mpsc;

use crate::reconcile::diag::States;
use crate::reconcile::netns::Roots;
use crate::reconcile::owners::OwnerCache;

/// Rows per message: sending costs nothing beside the dump, and the fold is
/// back at its ring within a millisecond.
pub const BATCH_ROWS: usize = 512;

/// CPU time that the initial scan spends on the search for owners of listeners:
/// about four thousand descriptors. The walk after it finds the rest.
const STARTUP_SEARCH: Duration = Duration::from_millis(5);

/// The receiving end is gone, so the thread ends too.
pub struct Closed;

pub struct Outbox {
    sender: mpsc::Sender<WalkMessage>,
    /// Of the rows that are sent, see [`WalkMessage::Rows`].
    pub pass: u8,
    /// At most [`BATCH_ROWS`].
    rows: Vec<Row>,
    /// Listeners whose owners are still to be found, at most [`BATCH_ROWS`].
    listeners: Vec<Row>,
    pub owners: OwnerCache,
    roots: Roots,
    owner_use: OwnerUse,
    pub wanted: States,
    pub audit: bool,
}

enum OwnerUse {
    /// `--listeners off`.
    None,
    /// Only what is known: samples between audits look nothing up.
    Cached,
    /// Find what is not known.
    Search,
}

impl Outbox {
    pub fn new(sender: mpsc::Sender<WalkMessage>, roots: Roots) -> Self {
        Self {
            sender,
            pass: 0,
            rows: Vec::new(),
            listeners: Vec::new(),
            owners: OwnerCache::default(),
            roots,
            owner_use: OwnerUse::None,
            wanted: States::LISTEN,
            audit: false,
        }
    }

    pub fn begin_walk(&mut self, walk: Walk, listeners: bool) {
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
            (false, _) => self.owners.resume(),
        }
    }

    /// Takes a row if this walk wants it.
    pub fn push(&mut self, mut row: Row) -> Result<(), Closed> {
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
            // Listeners stay before what they accepted.
            self.find_owners()?;
        }
        if self.wanted.has(row.state) {
            self.batch(row)?;
        }
        Ok(())
    }

    fn find_owners(&mut self) -> Result<(), Closed> {
        let listeners = std::mem::take(&mut self.listeners);
        let inodes: Vec<u32> = listeners.iter().map(|row| row.inode).collect();
        let owners = self.owners.owners(&self.roots, &inodes);
        for (row, owner) in listeners.into_iter().zip(owners) {
            self.batch(Row { owner, ..row })?;
        }
        Ok(())
    }

    fn batch(&mut self, row: Row) -> Result<(), Closed> {
        if self.rows.capacity() == 0 {
            self.rows.reserve_exact(BATCH_ROWS);
        }
        self.rows.push(row);
        if self.rows.len() == BATCH_ROWS {
            self.send_rows()?;
        }
        Ok(())
    }

    fn send_rows(&mut self) -> Result<(), Closed> {
        let rows = std::mem::take(&mut self.rows);
        let pass = self.pass;
        self.send(WalkMessage::Rows { pass, rows })
    }

    /// Sends what waits: the end of a pass.
    pub fn flush(&mut self) -> Result<(), Closed> {
        self.find_owners()?;
        match self.rows.is_empty() {
            true => Ok(()),
            false => self.send_rows(),
        }
    }

    pub fn send(&self, message: WalkMessage) -> Result<(), Closed> {
        self.sender.blocking_send(message).map_err(|_| Closed)
    }
}
