//! The inventory of listening sockets, by namespace, address and port.
//!
//! Events keep it current; every walk's LISTEN rows bring accept-queue
//! lengths, owners and what the events missed. A group that two complete
//! walks in a row do not show, and no event speaks of, ends.
//!
//! A namespace read under a stand-in goes by another name in events. A group
//! that only events told of and one of a stand-in at the same address and
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
    /// Its rows come under a stand-in for its namespace.
    stand_in: bool,
    /// Which walk showed it first.
    seen: u32,
    /// Of a stand-in: its namespace in events; 0 where none spoke of it.
    heard_as: NetnsId,
}

/// The inventory.
#[derive(Debug)]
pub(super) struct Listeners {
    enabled: bool,
    max: usize,
    host: NetnsId,
    groups: BTreeMap<Group, State>,
    /// Some group came under a stand-in, so events may go by another name.
    stand_ins: bool,
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
            stand_ins: false,
            walks: 0,
            ended: None,
            unplaced: BTreeMap::new(),
            overflow: 0,
        }
    }

    /// A socket began to listen.
    pub(super) fn listen(&mut self, netns: NetnsId, address: IpAddr, port: u16, owner: &Owner) {
        let group = (netns, address, port);
        let group = self.under_stand_in(group, false).unwrap_or(group);
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
        let group = self.under_stand_in(group, true).unwrap_or(group);
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

    /// The group of a stand-in that an event about `group` means, unless it
    /// has one of its own: the one that an event has named so before, or, where
    /// it may be a `guess`, the only one that none has named.
    fn under_stand_in(&self, group: Group, guess: bool) -> Option<Group> {
        if !self.stand_ins || self.groups.contains_key(&group) {
            return None;
        }
        let (netns, address, port) = group;
        let mut unnamed = Vec::new();
        for (&found, state) in &self.groups {
            if state.stand_in && (found.1, found.2) == (address, port) {
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

    /// A LISTEN row, of a namespace or of a stand-in for one.
    pub(super) fn row(&mut self, netns: NetnsId, stand_in: bool, row: &Row) {
        self.stand_ins |= stand_in;
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
            state.stand_in = stand_in;
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
    /// stand-in has them.
    pub(super) fn end(&mut self, covered: impl Fn(NetnsId) -> bool, all: bool) {
        self.ended = None;
        if !all {
            return;
        }
        self.walks = self.walks.wrapping_add(1);
        if self.stand_ins {
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

    /// Gives groups that only events told of to those of stand-ins: each to
    /// the one first seen last, among those that no event has named.
    fn find_told(&mut self, covered: impl Fn(NetnsId) -> bool) {
        let told: Vec<Group> = (self.groups.iter())
            .filter(|(group, state)| state.told && !state.touched && !covered(group.0))
            .map(|(&group, _)| group)
            .collect();
        for group in told {
            let same = (self.groups.iter())
                .filter(|(found, state)| {
                    let unnamed = state.stand_in && state.heard_as == 0;
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
mod tests {
    use super::*;
    use crate::event::Tuple;

    fn owner(pid: u32, name: &[u8]) -> Owner {
        let mut owner = Owner {
            pid,
            ..Owner::default()
        };
        owner.comm[..name.len()].copy_from_slice(name);
        owner
    }

    fn row(address: &str, port: u16, queue: (u32, u32), owner: Owner) -> Row {
        let local: IpAddr = address.parse().unwrap();
        Row {
            state: connmon_common::state::LISTEN,
            tuple: Tuple {
                local,
                local_port: port,
                remote: local,
                remote_port: 0,
            },
            cookie: 0,
            inode: 1,
            id: 0,
            receive_queue: queue.0,
            send_queue: queue.1,
            traffic: None,
            owner,
        }
    }

    fn walk(listeners: &mut Listeners, netns: NetnsId, rows: &[Row]) {
        listeners.begin();
        for row in rows {
            listeners.row(netns, false, row);
        }
        listeners.end_namespace(netns, true, true);
        listeners.end(|other| other == netns, true);
    }

    const ANY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);

    #[test]
    fn a_reuseport_group_is_one_series_with_the_lowest_pid() {
        let mut listeners = Listeners::new(true, 10, 1);
        for pid in [30, 20, 40] {
            listeners.listen(1, ANY, 80, &owner(pid, b"nginx"));
        }
        walk(
            &mut listeners,
            1,
            &[
                row("0.0.0.0", 80, (1, 128), owner(20, b"nginx")),
                row("0.0.0.0", 80, (2, 128), owner(40, b"nginx")),
                row("::", 80, (0, 5), owner(50, b"other")),
            ],
        );
        let rows = listeners.snapshot();
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].address, "0.0.0.0");
        assert_eq!((rows[0].pid, rows[0].sockets), (20, 2));
        assert_eq!((rows[0].queue_length, rows[0].queue_limit), (3, Some(256)));
        assert!(rows[0].host);
        assert_eq!(
            (rows[1].address.as_str(), rows[1].process.as_str()),
            ("::", "other")
        );
    }

    #[test]
    fn a_queue_limit_is_known_once_a_table_told_it() {
        let mut listeners = Listeners::new(true, 10, 1);
        let limit = |listeners: &Listeners| listeners.snapshot()[0].queue_limit;
        listeners.listen(1, ANY, 80, &owner(1, b"a"));
        assert_eq!(limit(&listeners), None, "no table was read");
        // /proc does not tell it.
        listeners.begin();
        listeners.row(1, false, &row("0.0.0.0", 80, (0, 0), owner(1, b"a")));
        listeners.end_namespace(1, true, false);
        assert_eq!(limit(&listeners), None);
        // sock_diag does, and 0 is a limit.
        walk(
            &mut listeners,
            1,
            &[row("0.0.0.0", 80, (0, 0), owner(1, b"a"))],
        );
        assert_eq!(limit(&listeners), Some(0));
    }

    #[test]
    fn unlisten_ends_a_group_and_an_older_row_does_not_bring_it_back() {
        let mut listeners = Listeners::new(true, 10, 1);
        listeners.listen(1, ANY, 80, &owner(1, b"a"));
        listeners.begin();
        listeners.unlisten(1, ANY, 80);
        listeners.row(1, false, &row("0.0.0.0", 80, (0, 1), owner(1, b"a")));
        listeners.end_namespace(1, true, true);
        assert!(listeners.snapshot().is_empty());
    }

    #[test]
    fn two_absences_end_a_group_one_does_not() {
        let mut listeners = Listeners::new(true, 10, 1);
        let present = [row("0.0.0.0", 80, (0, 1), owner(0, b""))];
        walk(&mut listeners, 1, &present);
        assert_eq!(listeners.snapshot()[0].process, "unknown");
        walk(&mut listeners, 1, &[]);
        walk(&mut listeners, 1, &present);
        walk(&mut listeners, 1, &[]);
        assert_eq!(listeners.snapshot().len(), 1);
        walk(&mut listeners, 1, &[]);
        assert!(listeners.snapshot().is_empty());
        walk(&mut listeners, 2, &present);
        walk(&mut listeners, 1, &[]);
        walk(&mut listeners, 1, &[]);
        assert!(listeners.snapshot().is_empty(), "its namespace is gone");
    }

    /// A walk that reads one namespace, under a stand-in for it.
    fn walk_stand_in(listeners: &mut Listeners, stand_in: NetnsId, rows: &[Row]) {
        listeners.begin();
        for row in rows {
            listeners.row(stand_in, true, row);
        }
        listeners.end_namespace(stand_in, true, true);
        listeners.end(|other| other == stand_in, true);
    }

    #[test]
    fn a_listener_under_a_stand_in_is_the_one_that_events_spoke_of() {
        const STAND_IN: NetnsId = 4_000_000_000;
        let mut listeners = Listeners::new(true, 10, 1);
        let rows = [row("0.0.0.0", 80, (0, 1), owner(0, b""))];
        listeners.listen(7, ANY, 80, &owner(20, b"nginx"));
        walk_stand_in(&mut listeners, STAND_IN, &rows);
        let seen = listeners.snapshot();
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert_eq!((seen[0].netns, seen[0].sockets), (STAND_IN, 1));
        assert_eq!((seen[0].process.as_str(), seen[0].pid), ("nginx", 20));
        // Further events of that namespace mean the same group.
        listeners.listen(7, ANY, 80, &owner(10, b"nginx"));
        let seen = listeners.snapshot();
        assert_eq!((seen.len(), seen[0].sockets, seen[0].pid), (1, 2, 10));
        // Another namespace's do not.
        listeners.listen(8, ANY, 80, &owner(30, b"caddy"));
        listeners.unlisten(8, ANY, 80);
        listeners.unlisten(7, ANY, 80);
        assert_eq!(listeners.snapshot()[0].sockets, 1);
        listeners.unlisten(7, ANY, 80);
        assert!(listeners.snapshot().is_empty());
    }

    #[test]
    fn a_listener_of_before_under_a_stand_in_ends_with_its_event() {
        let mut listeners = Listeners::new(true, 10, 1);
        let rows = [row("0.0.0.0", 80, (0, 1), owner(0, b""))];
        walk_stand_in(&mut listeners, 4_000_000_000, &rows);
        listeners.unlisten(7, ANY, 81);
        assert_eq!(listeners.snapshot().len(), 1);
        listeners.unlisten(7, ANY, 80);
        assert!(listeners.snapshot().is_empty());
        // Of two, nobody knows which: the walks will tell.
        let mut listeners = Listeners::new(true, 10, 1);
        listeners.begin();
        for stand_in in [4_000_000_000, 4_000_000_001] {
            listeners.row(stand_in, true, &rows[0]);
            listeners.end_namespace(stand_in, true, true);
        }
        listeners.end(|other| other != 7, true);
        listeners.unlisten(7, ANY, 80);
        assert_eq!(listeners.snapshot().len(), 2);
    }

    #[test]
    fn a_listener_goes_to_the_stand_in_that_is_new_and_with_its_namespace() {
        let mut listeners = Listeners::new(true, 10, 1);
        let rows = [row("0.0.0.0", 80, (0, 1), owner(0, b""))];
        let read = |listeners: &mut Listeners, stand_ins: &[NetnsId]| {
            listeners.begin();
            for &stand_in in stand_ins {
                listeners.row(stand_in, true, &rows[0]);
                listeners.end_namespace(stand_in, true, true);
            }
            listeners.end(|other| stand_ins.contains(&other), true);
        };
        read(&mut listeners, &[4_000_000_001, 4_000_000_003]);
        listeners.listen(7, ANY, 80, &owner(20, b"nginx"));
        let all = [4_000_000_001, 4_000_000_002, 4_000_000_003];
        read(&mut listeners, &all);
        let seen: Vec<_> = (listeners.snapshot().iter())
            .map(|row| (row.netns, row.pid))
            .collect();
        assert_eq!(seen, [(all[0], 0), (all[1], 20), (all[2], 0)]);
        // A namespace that ended, and an event that meant none of the rest.
        listeners.listen(9, ANY, 81, &owner(30, b"caddy"));
        for _ in 0..3 {
            read(&mut listeners, &all[..2]);
        }
        assert_eq!(listeners.snapshot().len(), 2);
    }

    #[test]
    fn a_listener_that_is_told_while_a_stand_in_is_read_waits_for_the_next_walk() {
        let mut listeners = Listeners::new(true, 10, 1);
        let rows = [row("0.0.0.0", 80, (0, 1), owner(0, b""))];
        listeners.begin();
        listeners.row(4_000_000_000, true, &rows[0]);
        listeners.listen(7, ANY, 80, &owner(20, b"nginx"));
        listeners.end_namespace(4_000_000_000, true, true);
        listeners.end(|other| other != 7, true);
        assert_eq!(listeners.snapshot().len(), 2, "it may be another's");
        walk_stand_in(&mut listeners, 4_000_000_000, &rows);
        assert_eq!(listeners.snapshot().len(), 1);
    }

    #[test]
    fn the_inventory_is_bounded_and_can_be_off() {
        let mut listeners = Listeners::new(true, 2, 1);
        for port in 1..=5 {
            listeners.listen(1, ANY, port, &owner(1, b"a"));
        }
        assert_eq!(listeners.snapshot().len(), 2);
        assert_eq!(listeners.overflow, 3);
        let mut off = Listeners::new(false, 2, 1);
        off.listen(1, ANY, 1, &owner(1, b"a"));
        assert!(off.snapshot().is_empty());
        assert_eq!(off.overflow, 0);
    }

    #[test]
    fn a_group_without_a_place_is_counted_once_while_it_has_none() {
        let mut listeners = Listeners::new(true, 2, 1);
        let rows: Vec<Row> = (1..=5)
            .map(|port| row("0.0.0.0", port, (0, 1), owner(1, b"a")))
            .collect();
        listeners.listen(1, ANY, 3, &owner(1, b"a"));
        listeners.listen(1, ANY, 4, &owner(1, b"a"));
        listeners.listen(1, ANY, 5, &owner(1, b"a"));
        for _ in 0..3 {
            walk(&mut listeners, 1, &rows);
            assert_eq!(listeners.overflow, 3);
        }
        // A namespace read in part says nothing of what it did not show.
        listeners.begin();
        listeners.end_namespace(1, false, true);
        listeners.end(|_| true, true);
        walk(&mut listeners, 1, &rows);
        assert_eq!(listeners.overflow, 3);
        // One that gets a place, loses it and comes back is a new loss, as is
        // one that was gone meanwhile.
        listeners.unlisten(1, ANY, 3);
        walk(&mut listeners, 1, &[rows[0], rows[3]]);
        assert_eq!(listeners.snapshot().len(), 2);
        walk(&mut listeners, 1, &rows);
        assert_eq!(listeners.overflow, 6, "2, 3 and 5");
    }

    #[test]
    fn what_is_remembered_of_groups_without_a_place_is_bounded() {
        let mut listeners = Listeners::new(true, 0, 1);
        let count = UNPLACED_MAX as u16 + 10;
        for _ in 0..2 {
            for port in 0..count {
                listeners.listen(1, ANY, port, &owner(1, b"a"));
            }
        }
        assert_eq!(listeners.unplaced.len(), UNPLACED_MAX);
        assert_eq!(listeners.overflow, u64::from(count) + 10);
        walk(&mut listeners, 2, &[]);
        assert!(listeners.unplaced.is_empty(), "their namespace is gone");
    }

    #[test]
    fn process_names_in_the_inventory_are_printable() {
        let mut listeners = Listeners::new(true, 10, 1);
        let names = ["a\n\u{1b}", "b\u{202e}c", "d\u{200b}\u{ad}e", ""];
        for (name, port) in names.iter().zip(1..) {
            listeners.listen(1, ANY, port, &owner(7, name.as_bytes()));
        }
        let rows = listeners.snapshot();
        let shown: Vec<&str> = rows.iter().map(|row| row.process.as_str()).collect();
        let expected = [
            "a\u{fffd}\u{fffd}",
            "b\u{fffd}c",
            "d\u{fffd}\u{fffd}e",
            "unknown",
        ];
        assert_eq!(shown, expected);
    }
}
