//! What is counted per service port and direction, within `--ports.allow` and
//! `--ports.max`.
//!
//! A connection remembers the row it is counted in, and a row with a live
//! connection never ends, so a row number stays valid for as long as anything
//! refers to it. Row 0 of every direction is `other`.

use super::snapshot::{Direction, FailureReason, Flow, PortLabel, PortRow, Sum};

/// A row may end after so long without a connection or a change: ten minutes.
const IDLE_NS: u64 = 600 * 1_000_000_000;

/// Row number of `other`.
pub(super) const OTHER: u16 = 0;

/// A set of ports: 8 KiB.
#[derive(Clone, Debug)]
pub(super) struct PortSet(Box<[u64; 1024]>);

impl PortSet {
    pub(super) fn new() -> Self {
        Self(Box::new([0; 1024]))
    }

    /// The ports of inclusive ranges.
    pub(super) fn of_ranges(ranges: &[(u16, u16)]) -> Self {
        let mut set = Self::new();
        for &(first, last) in ranges {
            for port in first..=last {
                set.insert(port);
            }
        }
        set
    }

    pub(super) fn insert(&mut self, port: u16) {
        self.0[usize::from(port / 64)] |= 1 << (port % 64);
    }

    pub(super) fn contains(&self, port: u16) -> bool {
        self.0[usize::from(port / 64)] >> (port % 64) & 1 == 1
    }

    pub(super) fn clear(&mut self) {
        self.0.fill(0);
    }
}

/// One row.
#[derive(Clone, Debug, Default)]
pub(super) struct PortCounters {
    pub(super) flow: Flow,
    pub(super) failures: [u64; FailureReason::COUNT],
    pub(super) accept_wait: Sum,
    close_wait: u64,
    /// CLOSE_WAIT rows of the audit under way.
    close_wait_next: u64,
    /// Tracked connections that refer to this row, in whatever state.
    live: u64,
    changed_ns: u64,
    port: u16,
    used: bool,
}

/// The rows of one direction.
#[derive(Debug)]
pub(super) struct Ports {
    direction: Direction,
    /// Row by port, [`OTHER`] where there is none; empty for a direction
    /// without ports. Pages nobody touches cost no memory.
    by_port: Vec<u16>,
    rows: Vec<PortCounters>,
    /// Unused row numbers.
    free: Vec<u16>,
    /// Rows that were idle at the last look; looked at again before use.
    idle: Vec<u16>,
    /// Before this time no further row can have become idle.
    look_again_ns: u64,
    allow: Option<PortSet>,
    max: usize,
    /// Ports listening at the last audit or since.
    listening: Option<PortSet>,
    /// Connections counted in `other` because every row was taken.
    pub(super) overflow: u64,
    /// Rows that ended.
    pub(super) evicted: u64,
}

impl Ports {
    pub(super) fn new(direction: Direction, allow: Option<PortSet>, max: usize) -> Self {
        let has_ports = direction != Direction::Unknown;
        Self {
            direction,
            by_port: if has_ports {
                vec![OTHER; 1 << 16]
            } else {
                Vec::new()
            },
            rows: vec![PortCounters {
                used: true,
                ..PortCounters::default()
            }],
            free: Vec::new(),
            idle: Vec::new(),
            look_again_ns: 0,
            allow,
            max: max.min(usize::from(u16::MAX)),
            listening: (direction == Direction::Inbound).then(PortSet::new),
            overflow: 0,
            evicted: 0,
        }
    }

    /// The row of a port as it is: its own or `other`.
    pub(super) fn existing(&self, port: u16) -> u16 {
        self.by_port
            .get(usize::from(port))
            .copied()
            .unwrap_or(OTHER)
    }

    /// The row a connection to `port` counts in: its own, made where it may
    /// have one and there is room, else `other`. The second value is a row
    /// that ended to make room.
    pub(super) fn row_for(&mut self, now_ns: u64, port: u16) -> (u16, Option<u16>) {
        let row = self.existing(port);
        if row != OTHER || !self.may_have_row(port) {
            return (row, None);
        }
        match self.make_row(now_ns, port, self.is_listening(port)) {
            Some(made) => made,
            None => {
                self.overflow += 1;
                (OTHER, None)
            }
        }
    }

    /// Notes that `port` is listening and reserves a row for it where one is
    /// free. Returns a row that ended to make room.
    pub(super) fn reserve(&mut self, now_ns: u64, port: u16) -> Option<u16> {
        self.listening.as_mut()?.insert(port);
        if self.existing(port) != OTHER || !self.may_have_row(port) {
            return None;
        }
        self.make_row(now_ns, port, false)?.1
    }

    /// Puts the listening ports of a finished audit in place of what was
    /// known.
    pub(super) fn set_listening(&mut self, ports: &PortSet) {
        if let Some(listening) = &mut self.listening {
            listening.0.copy_from_slice(&ports.0[..]);
        }
    }

    fn may_have_row(&self, port: u16) -> bool {
        !self.by_port.is_empty() && self.allow.as_ref().is_none_or(|allow| allow.contains(port))
    }

    fn is_listening(&self, port: u16) -> bool {
        self.listening
            .as_ref()
            .is_some_and(|listening| listening.contains(port))
    }

    fn make_row(
        &mut self,
        now_ns: u64,
        port: u16,
        over_listening: bool,
    ) -> Option<(u16, Option<u16>)> {
        let mut ended = None;
        let row = if let Some(row) = self.free.pop() {
            row
        } else if self.rows.len() <= self.max {
            self.rows.push(PortCounters::default());
            (self.rows.len() - 1) as u16
        } else {
            let row = self.evict(now_ns, over_listening)?;
            ended = Some(row);
            row
        };
        self.rows[usize::from(row)] = PortCounters {
            port,
            used: true,
            changed_ns: now_ns,
            ..PortCounters::default()
        };
        self.by_port[usize::from(port)] = row;
        Some((row, ended))
    }

    /// Ends an idle row, one of a listening port only where `over_listening`.
    fn evict(&mut self, now_ns: u64, over_listening: bool) -> Option<u16> {
        let mut quiet = self.find_idle(now_ns, false);
        if quiet.is_none() && now_ns >= self.look_again_ns {
            self.look_for_idle(now_ns);
            quiet = self.find_idle(now_ns, false);
        }
        let place = match quiet {
            None if over_listening => self.find_idle(now_ns, true)?,
            quiet => quiet?,
        };
        let row = self.idle.swap_remove(place);
        self.by_port[usize::from(self.rows[usize::from(row)].port)] = OTHER;
        self.evicted += 1;
        Some(row)
    }

    /// Where in `idle` a row is that is still idle and whose port listens or
    /// does not. Rows that changed since are dropped on the way.
    fn find_idle(&mut self, now_ns: u64, listening: bool) -> Option<usize> {
        self.idle
            .retain(|&row| self.rows[usize::from(row)].is_idle(now_ns));
        self.idle
            .iter()
            .position(|&row| self.is_listening(self.rows[usize::from(row)].port) == listening)
    }

    fn look_for_idle(&mut self, now_ns: u64) {
        self.look_again_ns = now_ns.saturating_add(IDLE_NS);
        self.idle.clear();
        for (row, counters) in (0u16..).zip(&self.rows).skip(1) {
            if counters.is_idle(now_ns) {
                self.idle.push(row);
            } else if counters.used && counters.live == 0 {
                let idle_at = counters.changed_ns.saturating_add(IDLE_NS);
                self.look_again_ns = self.look_again_ns.min(idle_at);
            }
        }
    }

    /// A row that is about to change.
    pub(super) fn change(&mut self, now_ns: u64, row: u16) -> &mut PortCounters {
        let counters = &mut self.rows[usize::from(row)];
        counters.changed_ns = now_ns;
        counters
    }

    /// A tracked connection now refers to `row`.
    pub(super) fn attach(&mut self, now_ns: u64, row: u16) {
        self.change(now_ns, row).live += 1;
    }

    /// A tracked connection no longer refers to `row`.
    pub(super) fn detach(&mut self, now_ns: u64, row: u16) {
        let counters = self.change(now_ns, row);
        debug_assert!(counters.live > 0);
        counters.live = counters.live.saturating_sub(1);
    }

    /// The port of a row, or `other`.
    pub(super) fn label(&self, row: u16) -> PortLabel {
        match row {
            OTHER => PortLabel::Other,
            row => PortLabel::Port(self.rows[usize::from(row)].port),
        }
    }

    /// Counts a CLOSE_WAIT row of the audit under way.
    pub(super) fn saw_close_wait(&mut self, row: u16) {
        self.rows[usize::from(row)].close_wait_next += 1;
    }

    /// Drops what an abandoned audit counted.
    pub(super) fn forget_close_wait(&mut self) {
        for counters in &mut self.rows {
            counters.close_wait_next = 0;
        }
    }

    /// Publishes the CLOSE_WAIT counts of the audit that ended.
    pub(super) fn publish_close_wait(&mut self) {
        for counters in &mut self.rows {
            counters.close_wait = std::mem::take(&mut counters.close_wait_next);
        }
    }

    pub(super) fn snapshot(&self, out: &mut Vec<PortRow>) {
        for (row, counters) in (0u16..).zip(&self.rows) {
            if !counters.used {
                continue;
            }
            out.push(PortRow {
                port: self.label(row),
                direction: self.direction,
                flow: counters.flow,
                close_wait: counters.close_wait,
                failures: (self.direction == Direction::Outbound).then_some(counters.failures),
                accept_wait: (self.direction == Direction::Inbound).then_some(counters.accept_wait),
            });
        }
    }
}

impl PortCounters {
    fn is_idle(&self, now_ns: u64) -> bool {
        self.used && self.live == 0 && now_ns.saturating_sub(self.changed_ns) >= IDLE_NS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn inbound(max: usize) -> Ports {
        Ports::new(Direction::Inbound, None, max)
    }

    #[test]
    fn ports_beyond_the_cap_are_other_until_a_row_was_idle_for_ten_minutes() {
        let mut ports = inbound(2);
        let (a, _) = ports.row_for(0, 1);
        let (b, _) = ports.row_for(0, 2);
        ports.attach(0, a);
        ports.attach(0, b);
        assert_eq!(ports.row_for(S, 3), (OTHER, None));
        assert_eq!(ports.overflow, 1);
        ports.detach(5 * S, a);
        assert_eq!(ports.row_for(604 * S, 3), (OTHER, None), "a changed at 5 s");
        assert_eq!(ports.row_for(605 * S, 3), (a, Some(a)));
        assert_eq!(ports.label(a), PortLabel::Port(3));
        assert_eq!(ports.existing(1), OTHER);
        assert_eq!((ports.overflow, ports.evicted), (2, 1));
    }

    #[test]
    fn a_row_returns_at_zero() {
        let mut ports = inbound(1);
        let (row, _) = ports.row_for(0, 1);
        ports.change(0, row).flow.opened = 9;
        ports.row_for(600 * S, 2);
        let (row, _) = ports.row_for(1200 * S, 1);
        assert_eq!(ports.change(0, row).flow, Flow::default());
        assert_eq!(ports.evicted, 2);
    }

    #[test]
    fn nothing_ends_while_nobody_needs_its_place() {
        let mut ports = inbound(3);
        ports.row_for(0, 1);
        ports.row_for(10_000 * S, 2);
        assert_ne!(ports.existing(1), OTHER);
        assert_eq!(ports.evicted, 0);
    }

    #[test]
    fn listening_ports_come_first() {
        let mut ports = inbound(2);
        assert_eq!(ports.reserve(0, 80), None);
        ports.row_for(0, 5000);
        assert_eq!(ports.row_for(600 * S, 6000).0, ports.existing(6000));
        assert_ne!(ports.existing(80), OTHER, "5000 went, though 80 is as idle");
        assert_eq!(ports.existing(5000), OTHER);
        assert_eq!(ports.row_for(1200 * S, 6001).0, ports.existing(6001));
        ports.attach(1200 * S, ports.existing(6001));
        assert_eq!(ports.row_for(9999 * S, 6002), (OTHER, None), "80 listens");
        assert_eq!(ports.reserve(9999 * S, 443), None);
        assert_eq!(
            ports.existing(443),
            OTHER,
            "reserving does not push out another listener"
        );
        assert_ne!(ports.row_for(9999 * S, 443).0, OTHER, "a connection does");
        assert_eq!(ports.existing(80), OTHER);
    }

    #[test]
    fn a_row_that_fell_idle_later_goes_before_a_listening_one() {
        let mut ports = inbound(2);
        ports.reserve(0, 80);
        let (row, _) = ports.row_for(0, 5000);
        ports.change(300 * S, row);
        assert_eq!(ports.row_for(600 * S, 6000), (OTHER, None), "80 listens");
        assert_eq!(ports.row_for(1000 * S, 6000), (row, Some(row)));
        assert_ne!(ports.existing(80), OTHER);
        // As for a port that listens itself, though 80 is idle.
        let mut ports = inbound(2);
        ports.reserve(0, 80);
        let (row, _) = ports.row_for(0, 5000);
        ports.change(300 * S, row);
        assert_eq!(ports.row_for(600 * S, 6000), (OTHER, None));
        ports.reserve(700 * S, 443);
        assert_eq!(ports.row_for(1000 * S, 443), (row, Some(row)));
        assert_ne!(ports.existing(80), OTHER);
    }

    #[test]
    fn the_allow_list_is_no_overflow() {
        let allow = PortSet::of_ranges(&[(22, 22), (8000, 8002)]);
        let mut ports = Ports::new(Direction::Outbound, Some(allow), 10);
        assert_eq!(ports.row_for(0, 23), (OTHER, None));
        assert_ne!(ports.row_for(0, 8002).0, OTHER);
        assert_eq!(ports.row_for(0, 8003), (OTHER, None));
        assert_eq!(ports.overflow, 0);
    }

    #[test]
    fn every_port_at_once_stays_bounded() {
        let mut ports = inbound(128);
        for round in 0..3u64 {
            for port in 0..=u16::MAX {
                ports.row_for(round * 700 * S, port);
            }
        }
        let mut rows = Vec::new();
        ports.snapshot(&mut rows);
        assert_eq!(rows.len(), 129);
        assert_eq!(rows[0].port, PortLabel::Other);
    }
}
