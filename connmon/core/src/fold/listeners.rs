//! The listening sockets, grouped by namespace, address and port.
//!
//! Events keep the groups current. The LISTEN rows of each walk add accept
//! queues, owners and what the events missed. A group ends when two complete
//! walks in a row do not show it and no event reports it meanwhile.
//!
//! A namespace that is read under a surrogate id has another id in events. Two
//! groups with the same address and port, one known from events alone and one
//! with a surrogate id, are therefore taken for one, once a walk has shown the
//! second.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::snapshot::ListenerRow;
use crate::event::{NetnsId, Owner};
use crate::scan::Row;
use crate::text::process_name;

/// (namespace, address, port)
type Key = (NetnsId, IpAddr, u16);

/// Most groups that ended during a walk and are remembered.
const ENDED_MAX: usize = 1024;

/// Most groups beyond the bound that are remembered, to count each once;
/// further ones are counted every time.
const UNPLACED_MAX: usize = 4096;

#[derive(Clone, Copy, Debug, Default)]
struct Sockets {
    count: u32,
    /// The owner with the lowest pid; pid 0 if none is known.
    owner: Owner,
    queue_length: u64,
    /// `None` until sock_diag reported it.
    queue_limit: Option<u64>,
}

impl Sockets {
    fn add_owner(&mut self, owner: &Owner) {
        if owner.pid != 0 && (self.owner.pid == 0 || owner.pid < self.owner.pid) {
            self.owner = *owner;
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Group {
    now: Sockets,
    /// From the rows of the walk in progress.
    next: Sockets,
    /// An event came since the walk began, so the rows may be older.
    touched: bool,
    /// Absent from the last complete walk.
    missed: bool,
    /// Known from events alone.
    events_only: bool,
    /// Its namespace is a surrogate id.
    surrogate: bool,
    /// The number of the walk that showed it first.
    first_walk: u32,
    /// With a surrogate id: the namespace in events; 0 if it is not known.
    event_netns: NetnsId,
}

/// The listening sockets.
#[derive(Debug)]
pub(super) struct Listeners {
    enabled: bool,
    max: usize,
    host: NetnsId,
    groups: BTreeMap<Key, Group>,
    /// Some group has had a surrogate id.
    surrogates: bool,
    /// Complete walks so far.
    walks: u32,
    /// Groups that ended since the walk in progress began; `None` without one.
    ended: Option<Vec<Key>>,
    /// Groups beyond the bound, and whether one was reported since the last
    /// walk began.
    unplaced: BTreeMap<Key, bool>,
    /// Groups beyond the bound, each counted once.
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
        let key = self.event_key((netns, address, port), false);
        if let Some(group) = self.group(key) {
            group.events_only |= group.now.count == 0;
            group.touched = true;
            group.missed = false;
            group.now.count += 1;
            group.now.add_owner(owner);
        }
    }

    /// A socket stopped listening. The next walk finds the owner of the rest.
    pub(super) fn unlisten(&mut self, netns: NetnsId, address: IpAddr, port: u16) {
        let key = self.event_key((netns, address, port), true);
        let Some(group) = self.groups.get_mut(&key) else {
            return;
        };
        group.touched = true;
        group.now.count = group.now.count.saturating_sub(1);
        if group.now.count == 0 {
            self.groups.remove(&key);
            if let Some(ended) = &mut self.ended
                && ended.len() < ENDED_MAX
            {
                ended.push(key);
            }
        }
    }

    /// The group of an event: that with its namespace, else that with a
    /// surrogate id known for the namespace. To end a group, also the only one
    /// whose surrogate id is not known for another namespace.
    fn event_key(&self, key: Key, ends: bool) -> Key {
        if !self.surrogates || self.groups.contains_key(&key) {
            return key;
        }
        let (mut found, mut unknown) = (None, Vec::new());
        for (&other, group) in &self.groups {
            if group.surrogate && (other.1, other.2) == (key.1, key.2) {
                match group.event_netns {
                    0 => unknown.push(other),
                    netns if netns == key.0 => found = Some(other),
                    _ => {}
                }
            }
        }
        match unknown[..] {
            [only] if ends => found.unwrap_or(only),
            _ => found.unwrap_or(key),
        }
    }

    /// A walk begins.
    pub(super) fn begin(&mut self) {
        self.ended = Some(Vec::new());
        for group in self.groups.values_mut() {
            group.next = Sockets::default();
            group.touched = false;
        }
        for reported in self.unplaced.values_mut() {
            *reported = false;
        }
    }

    /// A LISTEN row of a namespace, or of a surrogate id for one.
    pub(super) fn row(&mut self, netns: NetnsId, surrogate: bool, row: &Row) {
        self.surrogates |= surrogate;
        let key = (netns, row.tuple.local, row.tuple.local_port);
        let may_have_ended = self
            .ended
            .as_ref()
            .is_none_or(|ended| ended.len() >= ENDED_MAX || ended.contains(&key));
        if may_have_ended && !self.groups.contains_key(&key) {
            if let Some(reported) = self.unplaced.get_mut(&key) {
                *reported = true;
            }
            return;
        }
        let walks = self.walks;
        if let Some(group) = self.group(key) {
            if group.now.count == 0 && group.next.count == 0 {
                group.first_walk = walks;
            }
            group.events_only = false;
            group.surrogate = surrogate;
            group.next.count += 1;
            group.next.add_owner(&row.owner);
            group.next.queue_length += u64::from(row.receive_queue);
            *group.next.queue_limit.get_or_insert(0) += u64::from(row.send_queue);
        }
    }

    /// All rows of a namespace are merged. `limits`: the rows had the limits of
    /// the accept queues.
    pub(super) fn end_namespace(&mut self, netns: NetnsId, complete: bool, limits: bool) {
        let lowest = IpAddr::from([0u8; 4]);
        let range = (netns, lowest, 0)..(netns.saturating_add(1), lowest, 0);
        let ended = self.groups.extract_if(range.clone(), |_, group| {
            let next = std::mem::take(&mut group.next);
            if next.count == 0 {
                let absent = complete && !group.touched;
                let ends = absent && (group.missed || group.now.count == 0);
                group.missed |= absent;
                return ends;
            }
            group.missed = false;
            group.now.queue_length = next.queue_length;
            group.now.queue_limit = next.queue_limit.filter(|_| limits);
            if !group.touched {
                group.now.count = next.count;
                if next.owner.pid != 0 {
                    group.now.owner = next.owner;
                }
            }
            false
        });
        ended.for_each(drop);
        let ended = self
            .unplaced
            .extract_if(range, |_, reported| complete && !*reported);
        ended.for_each(drop);
    }

    /// A walk is over. `covered`: whether a namespace still exists, or may. The
    /// groups of others end as absent ones do, but those known from events
    /// alone at once if a group with a surrogate id is the same.
    pub(super) fn end(&mut self, covered: impl Fn(NetnsId) -> bool, audit: bool) {
        self.ended = None;
        if !audit {
            return;
        }
        self.walks = self.walks.wrapping_add(1);
        if self.surrogates {
            self.join_surrogates(&covered);
        }
        self.groups.retain(|key, group| {
            let stays = covered(key.0) || group.touched;
            stays || !std::mem::replace(&mut group.missed, true)
        });
        self.unplaced
            .retain(|key, reported| covered(key.0) || *reported);
    }

    /// Joins each group that is known from events alone to one with a surrogate
    /// id: of those with the same address and port whose namespace is not
    /// known, the one that was shown last for the first time.
    fn join_surrogates(&mut self, covered: impl Fn(NetnsId) -> bool) {
        let events_only: Vec<Key> = (self.groups.iter())
            .filter(|(key, group)| group.events_only && !group.touched && !covered(key.0))
            .map(|(&key, _)| key)
            .collect();
        for key in events_only {
            let walks = self.walks;
            let Some(joined) = self.groups.get(&key).copied() else {
                continue;
            };
            let same = (self.groups.iter_mut())
                .filter(|(other, group)| {
                    let unknown = group.surrogate && group.event_netns == 0;
                    unknown && (other.1, other.2) == (key.1, key.2)
                })
                .min_by_key(|(_, group)| walks.wrapping_sub(group.first_walk));
            if let Some((_, same)) = same {
                same.event_netns = key.0;
                if same.now.owner.pid == 0 {
                    same.now.owner = joined.now.owner;
                }
                self.groups.remove(&key);
            }
        }
    }

    fn group(&mut self, key: Key) -> Option<&mut Group> {
        if !self.enabled {
            return None;
        }
        if !self.groups.contains_key(&key) && self.groups.len() >= self.max {
            let known = self.unplaced.contains_key(&key);
            self.overflow += u64::from(!known);
            if known || self.unplaced.len() < UNPLACED_MAX {
                self.unplaced.insert(key, true);
            }
            return None;
        }
        self.unplaced.remove(&key);
        Some(self.groups.entry(key).or_default())
    }

    pub(super) fn snapshot(&self) -> Vec<ListenerRow> {
        let groups = self.groups.iter().map(|(key, group)| (key, &group.now));
        groups
            .filter(|(_, now)| now.count > 0)
            .map(|(&(netns, address, port), now)| ListenerRow {
                netns,
                host: netns == self.host,
                address: address.to_string(),
                port,
                process: process_name(&now.owner.comm).unwrap_or_else(|| "unknown".to_owned()),
                pid: now.owner.pid,
                sockets: now.count,
                queue_length: now.queue_length,
                queue_limit: now.queue_limit,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
