//! The inventory of listening sockets, by namespace, address and port.
//!
//! Events keep it current; every walk's LISTEN rows bring accept-queue
//! lengths, owners and what the events missed. A group that two complete
//! walks in a row do not show, and no event speaks of, ends.
//!
//! A namespace read under a surrogate id goes by another name in events. A group
//! that only events told of and one of a surrogate id at the same address and
//! port are then taken for the same, once a walk has shown the second.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::snapshot::ListenerRow;
use crate::event::{NetnsId, Owner};
use crate::scan::Row;
use crate::text::process_name;

/// (namespace, address, port)
type Group = (NetnsId, IpAddr, u16);

/// Most groups remembered to have ended while a walk is under way.
const ENDED_MAX: usize = 1024;

/// Most groups remembered to have found no place, so that each is counted
/// once; further ones are counted whenever they are met.
const UNPLACED_MAX: usize = 4096;

#[derive(Clone, Copy, Debug, Default)]
struct Sockets {
    count: u32,
    /// Lowest pid known; 0 for none.
    pid: u32,
    comm: [u8; 16],
    queue_length: u64,
    /// `None` until a table has told it.
    queue_limit: Option<u64>,
}

impl Sockets {
    fn add_owner(&mut self, owner: &Owner) {
        if owner.pid != 0 && (self.pid == 0 || owner.pid < self.pid) {
            self.pid = owner.pid;
            self.comm = owner.comm;
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    now: Sockets,
    /// From the rows of the walk under way.
    next: Sockets,
    /// An event came since the walk began, so its rows may be older.
    touched: bool,
    /// Absent from the last complete walk.
    missed: bool,
    /// No row has shown it.
    told: bool,
    /// Its rows come under a surrogate id for its namespace.
    surrogate: bool,
    /// Which walk showed it first.
    seen: u32,
    /// Of a surrogate id: its namespace in events; 0 where none spoke of it.
    heard_as: NetnsId,
}

/// The inventory.
#[derive(Debug)]
pub(super) struct Listeners {
    enabled: bool,
    max: usize,
    host: NetnsId,
    groups: BTreeMap<Group, State>,
    /// Some group came under a surrogate id, so events may go by another name.
    surrogates: bool,
    /// Walks so far.
    walks: u32,
    /// Groups that ended since the walk under way began; `None` without one.
    ended: Option<Vec<Group>>,
    /// Groups that found no place, and whether an event or a row spoke of
    /// them since the walk under way, or the last one, began.
    unplaced: BTreeMap<Group, bool>,
    /// Groups that found no place, each counted once while it has none.
    pub(super) overflow: u64,
}

impl Listeners {
    pub(super) fn new(enabled: bool, max: usize, host: NetnsId) -> Self {
        Self {
            enabled,
            max,
            host,
            groups: BTreeMap::new(),
            surrogates: false,
            walks: 0,
            ended: None,
            unplaced: BTreeMap::new(),
            overflow: 0,
        }
    }

    /// A socket began to listen.
    pub(super) fn listen(&mut self, netns: NetnsId, address: IpAddr, port: u16, owner: &Owner) {
        let group = (netns, address, port);
        let group = self.under_surrogate(group, false).unwrap_or(group);
        if let Some(state) = self.group(group) {
            state.told |= state.now.count == 0;
            state.touched = true;
            state.missed = false;
            state.now.count += 1;
            state.now.add_owner(owner);
        }
    }

    /// A socket stopped listening. Who owns what is left, the next walk says.
    pub(super) fn unlisten(&mut self, netns: NetnsId, address: IpAddr, port: u16) {
        let group = (netns, address, port);
        let group = self.under_surrogate(group, true).unwrap_or(group);
        let Some(state) = self.groups.get_mut(&group) else {
            return;
        };
        state.touched = true;
        state.now.count = state.now.count.saturating_sub(1);
        if state.now.count == 0 {
            self.groups.remove(&group);
            if let Some(ended) = &mut self.ended
                && ended.len() < ENDED_MAX
            {
                ended.push(group);
            }
        }
    }

    /// The group of a surrogate id that an event about `group` means, unless it
    /// has one of its own: the one that an event has named so before, or, where
    /// it may be a `guess`, the only one that none has named.
    fn under_surrogate(&self, group: Group, guess: bool) -> Option<Group> {
        if !self.surrogates || self.groups.contains_key(&group) {
            return None;
        }
        let (netns, address, port) = group;
        let mut unnamed = Vec::new();
        for (&found, state) in &self.groups {
            if state.surrogate && (found.1, found.2) == (address, port) {
                match state.heard_as {
                    0 => unnamed.push(found),
                    heard_as if heard_as == netns => return Some(found),
                    _ => {}
                }
            }
        }
        match unnamed[..] {
            [only] if guess => Some(only),
            _ => None,
        }
    }

    /// A walk begins.
    pub(super) fn begin(&mut self) {
        self.ended = Some(Vec::new());
        for state in self.groups.values_mut() {
            state.next = Sockets::default();
            state.touched = false;
        }
        for met in self.unplaced.values_mut() {
            *met = false;
        }
    }

    /// A LISTEN row, of a namespace or of a surrogate id for one.
    pub(super) fn row(&mut self, netns: NetnsId, surrogate: bool, row: &Row) {
        self.surrogates |= surrogate;
        let group = (netns, row.tuple.local, row.tuple.local_port);
        let may_have_ended = self
            .ended
            .as_ref()
            .is_none_or(|ended| ended.len() >= ENDED_MAX || ended.contains(&group));
        if may_have_ended && !self.groups.contains_key(&group) {
            if let Some(met) = self.unplaced.get_mut(&group) {
                *met = true;
            }
            return;
        }
        let walks = self.walks;
        if let Some(state) = self.group(group) {
            if state.now.count == 0 && state.next.count == 0 {
                state.seen = walks;
            }
            state.told = false;
            state.surrogate = surrogate;
            state.next.count += 1;
            state.next.add_owner(&row.owner);
            state.next.queue_length += u64::from(row.receive_queue);
            *state.next.queue_limit.get_or_insert(0) += u64::from(row.send_queue);
        }
    }

    /// All rows of a namespace are in; `limits`: they told the accept queues'
    /// limits.
    pub(super) fn end_namespace(&mut self, netns: NetnsId, complete: bool, limits: bool) {
        let lowest = IpAddr::from([0u8; 4]);
        let first = (netns, lowest, 0);
        let mut gone = Vec::new();
        for (group, state) in self.groups.range_mut(first..) {
            if group.0 != netns {
                break;
            }
            let next = std::mem::take(&mut state.next);
            if next.count == 0 {
                if state.touched || !complete {
                    continue;
                }
                if state.missed || state.now.count == 0 {
                    gone.push(*group);
                }
                state.missed = true;
                continue;
            }
            state.missed = false;
            state.now.queue_length = next.queue_length;
            state.now.queue_limit = next.queue_limit.filter(|_| limits);
            if !state.touched {
                state.now.count = next.count;
                if next.pid != 0 {
                    state.now.pid = next.pid;
                    state.now.comm = next.comm;
                }
            }
        }
        for group in gone {
            self.groups.remove(&group);
        }
        if complete {
            let unplaced = self.unplaced.range(first..);
            let gone: Vec<Group> = unplaced
                .take_while(|(group, _)| group.0 == netns)
                .filter(|&(_, &met)| !met)
                .map(|(&group, _)| group)
                .collect();
            for group in gone {
                self.unplaced.remove(&group);
            }
        }
    }

    /// A walk is over; `covered` says which namespaces still exist, under the
    /// name that they were read by, or may. Groups of the others end the way
    /// absent ones do; those that only events told of end at once where a
    /// surrogate id has them.
    pub(super) fn end(&mut self, covered: impl Fn(NetnsId) -> bool, all: bool) {
        self.ended = None;
        if !all {
            return;
        }
        self.walks = self.walks.wrapping_add(1);
        if self.surrogates {
            self.find_told(&covered);
        }
        self.groups.retain(|group, state| {
            if covered(group.0) || state.touched {
                return true;
            }
            !std::mem::replace(&mut state.missed, true)
        });
        self.unplaced.retain(|group, met| covered(group.0) || *met);
    }

    /// Gives groups that only events told of to those of surrogate ids: each to
    /// the one first seen last, among those that no event has named.
    fn find_told(&mut self, covered: impl Fn(NetnsId) -> bool) {
        let told: Vec<Group> = (self.groups.iter())
            .filter(|(group, state)| state.told && !state.touched && !covered(group.0))
            .map(|(&group, _)| group)
            .collect();
        for group in told {
            let same = (self.groups.iter())
                .filter(|(found, state)| {
                    let unnamed = state.surrogate && state.heard_as == 0;
                    unnamed && (found.1, found.2) == (group.1, group.2)
                })
                .min_by_key(|(_, state)| self.walks.wrapping_sub(state.seen))
                .map(|(&found, _)| found);
            let Some(same) = same else { continue };
            let Some(told) = self.groups.remove(&group) else {
                continue;
            };
            if let Some(state) = self.groups.get_mut(&same) {
                state.heard_as = group.0;
                if state.now.pid == 0 {
                    state.now.pid = told.now.pid;
                    state.now.comm = told.now.comm;
                }
            }
        }
    }

    fn group(&mut self, group: Group) -> Option<&mut State> {
        if !self.enabled {
            return None;
        }
        if !self.groups.contains_key(&group) && self.groups.len() >= self.max {
            let known = self.unplaced.contains_key(&group);
            self.overflow += u64::from(!known);
            if known || self.unplaced.len() < UNPLACED_MAX {
                self.unplaced.insert(group, true);
            }
            return None;
        }
        self.unplaced.remove(&group);
        Some(self.groups.entry(group).or_default())
    }

    pub(super) fn snapshot(&self) -> Vec<ListenerRow> {
        self.groups
            .iter()
            .filter(|(_, state)| state.now.count > 0)
            .map(|(&(netns, address, port), state)| ListenerRow {
                netns,
                host: netns == self.host,
                address: address.to_string(),
                port,
                process: process_name(&state.now.comm).unwrap_or_else(|| "unknown".to_owned()),
                pid: state.now.pid,
                sockets: state.now.count,
                queue_length: state.now.queue_length,
                queue_limit: state.now.queue_limit,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
