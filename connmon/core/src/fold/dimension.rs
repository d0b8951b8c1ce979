//! One dimension of the counters: a bounded table with a row for each label
//! value, and a row `other` for the rest. A connection remembers the numbers
//! of its rows; a row with a live connection never ends.
//!
//! To add a dimension, write a file with its [`Value`] and its snapshot. Then
//! give it a field in `Counters`, `Labels` and `Entry`; the compiler names the
//! functions that list all dimensions, and each of them gets one line.

use std::fmt::Debug;
use std::hash::Hash;

use hashbrown::HashMap;

use super::snapshot::{DIRECTIONS, FailureReason, Flow};

/// A row may end after this long without a connection or a change: ten minutes.
const IDLE_NS: u64 = 600 * 1_000_000_000;

/// Number of the row `other`.
pub(super) const OTHER: u16 = 0;

/// The row number of a dimension that does not count a connection.
pub(super) const NO_ROW: u16 = u16::MAX;

/// In place of the time of a change: there was none.
pub(super) const NEVER: u64 = u64::MAX;

/// A label value that has a row.
pub(super) trait Value: Copy + Eq + Hash + Debug {
    /// What a row holds beside [`Counts`].
    type Extra: Default + Debug;
}

/// How much a row is worth keeping: the idle row of the lowest rank ends first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// Connects to it failed; none was ever opened.
    #[default]
    Failed,
    /// A connection was opened, or existed before start.
    Opened,
    /// A listening port.
    Listening,
}

/// What every row counts.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) flows: [Flow; DIRECTIONS],
    pub(super) failures: [u64; FailureReason::COUNT],
    /// Tracked connections that refer to this row, in any state.
    pub(super) live: u64,
    /// When it last changed, or [`NEVER`].
    pub(super) changed_ns: u64,
}

/// One row.
#[derive(Debug)]
pub(super) struct Row<V: Value> {
    /// `None` for `other` and for a free row.
    value: Option<V>,
    pub(super) counts: Counts,
    pub(super) extra: V::Extra,
    pub(super) rank: Rank,
}

impl<V: Value> Row<V> {
    fn new(value: Option<V>, changed_ns: u64, rank: Rank) -> Self {
        Self {
            value,
            counts: Counts {
                changed_ns,
                ..Counts::default()
            },
            extra: V::Extra::default(),
            rank,
        }
    }
}

/// The rows of one dimension.
#[derive(Debug)]
pub(super) struct Dimension<V: Value> {
    index: HashMap<V, u16>,
    rows: Vec<Row<V>>,
    /// Numbers of free rows.
    free: Vec<u16>,
    /// By the highest rank that may end: no row can be idle before this time.
    search_ns: [u64; 3],
    /// Most rows beside `other` and the pinned ones.
    max: usize,
    /// Rows outside the bound, which never end.
    pinned: usize,
    /// Connections counted in `other` because all rows were taken.
    pub(super) overflow: u64,
    /// Rows that ended.
    pub(super) evicted: u64,
}

impl<V: Value> Dimension<V> {
    /// An empty dimension of at most `max` rows beside `other`.
    pub(super) fn new(max: usize) -> Self {
        Self {
            index: HashMap::new(),
            rows: vec![Row::new(None, 0, Rank::Listening)],
            free: Vec::new(),
            search_ns: [0; 3],
            max: max.min(usize::from(NO_ROW) - 1),
            pinned: 0,
            overflow: 0,
            evicted: 0,
        }
    }

    /// A dimension with one row for each of `values`, in this order after
    /// `other`. No row is added or ends.
    pub(super) fn fixed(values: impl Iterator<Item = V>) -> Self {
        let mut dimension = Self::new(0);
        for value in values {
            dimension.make_row(NEVER, value, Rank::Listening);
        }
        dimension
    }

    /// The row of `value`, else a new one, which may replace an idle row up to
    /// rank `over`, else `other`. Also returns the row that ended.
    pub(super) fn row_for(
        &mut self,
        now_ns: u64,
        value: V,
        rank: Rank,
        over: Option<Rank>,
    ) -> (u16, Option<u16>) {
        if let Some(row) = self.find(value) {
            let row_rank = &mut self.row_mut(row).rank;
            *row_rank = rank.max(*row_rank);
            return (row, None);
        }
        if self.rows.len() - 1 - self.free.len() - self.pinned < self.max {
            return (self.make_row(now_ns, value, rank), None);
        }
        match over.and_then(|over| self.evict(now_ns, over)) {
            Some(ended) => (self.make_row(now_ns, value, rank), Some(ended)),
            None => (OTHER, None),
        }
    }

    /// The row of a value that always has one, outside the bound.
    pub(super) fn pin(&mut self, now_ns: u64, value: V) -> u16 {
        self.find(value).unwrap_or_else(|| {
            self.pinned += 1;
            self.make_row(now_ns, value, Rank::Listening)
        })
    }

    pub(super) fn find(&self, value: V) -> Option<u16> {
        self.index.get(&value).copied()
    }

    fn make_row(&mut self, now_ns: u64, value: V, rank: Rank) -> u16 {
        let new = Row::new(Some(value), now_ns, rank);
        let row = self.free.pop().unwrap_or(self.rows.len() as u16);
        match self.rows.get_mut(usize::from(row)) {
            Some(free) => *free = new,
            None => self.rows.push(new),
        }
        self.index.insert(value, row);
        row
    }

    /// Ends the idle row of the lowest rank, if that is at most `over`.
    fn evict(&mut self, now_ns: u64, over: Rank) -> Option<u16> {
        if now_ns < self.search_ns[over as usize] {
            return None;
        }
        let mut lowest = None;
        let mut next_ns = now_ns.saturating_add(IDLE_NS);
        for (number, row) in (0u16..).zip(&self.rows) {
            if row.value.is_none() || row.rank > over || row.counts.live > 0 {
                continue;
            }
            let idle_ns = row.counts.changed_ns.saturating_add(IDLE_NS);
            if now_ns < idle_ns {
                next_ns = next_ns.min(idle_ns);
            } else if lowest.is_none_or(|(rank, _)| row.rank < rank) {
                lowest = Some((row.rank, number));
            }
        }
        match lowest {
            Some((_, row)) => self.end(row),
            None => self.search_ns[over as usize] = next_ns,
        }
        lowest.map(|(_, row)| row)
    }

    fn end(&mut self, row: u16) {
        let ended = self.row_mut(row);
        debug_assert_eq!(ended.counts.live, 0);
        if let Some(value) = ended.value.take() {
            self.index.remove(&value);
            self.free.push(row);
            self.evicted += 1;
        }
    }

    /// Ends the rows of all values for which `ends` holds.
    pub(super) fn end_where(&mut self, ends: impl Fn(V) -> bool) {
        for row in 0..self.rows.len() as u16 {
            if self.value(row).is_some_and(&ends) {
                self.end(row);
            }
        }
    }

    /// Changes what a row counts; does nothing for [`NO_ROW`].
    pub(super) fn change(&mut self, now_ns: u64, row: u16, change: impl FnOnce(&mut Counts)) {
        if let Some(row) = self.rows.get_mut(usize::from(row)) {
            row.counts.changed_ns = now_ns;
            change(&mut row.counts);
        }
    }

    /// A row, which this does not keep from being idle.
    pub(super) fn row_mut(&mut self, row: u16) -> &mut Row<V> {
        &mut self.rows[usize::from(row)]
    }

    /// The value of a row; `None` for `other`.
    pub(super) fn value(&self, row: u16) -> Option<V> {
        self.rows[usize::from(row)].value
    }

    /// Every row in use: first `other`, which has no value.
    pub(super) fn rows(&self) -> impl Iterator<Item = (Option<V>, &Row<V>)> {
        let (other, rows) = self.rows.split_at(1);
        let own = rows.iter().filter(|row| row.value.is_some());
        other.iter().chain(own).map(|row| (row.value, row))
    }

    /// Every row, free ones included. Ranks may be lowered.
    pub(super) fn rows_mut(&mut self) -> impl Iterator<Item = (Option<V>, &mut Row<V>)> {
        self.search_ns = [0; 3];
        self.rows.iter_mut().map(|row| (row.value, row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;
    const ANY: Option<Rank> = Some(Rank::Listening);

    impl Value for u8 {
        type Extra = ();
    }

    fn opened(dimension: &mut Dimension<u8>, now_ns: u64, value: u8) -> (u16, Option<u16>) {
        dimension.row_for(now_ns, value, Rank::Opened, Some(Rank::Opened))
    }

    #[test]
    fn beyond_the_cap_is_other_until_a_row_is_idle() {
        let mut dimension = Dimension::<u8>::new(2);
        let (a, _) = opened(&mut dimension, 0, 1);
        let (b, _) = opened(&mut dimension, 0, 2);
        dimension.change(0, a, |counts| counts.live += 1);
        dimension.change(0, b, |counts| counts.live += 1);
        assert_eq!(opened(&mut dimension, S, 3), (OTHER, None));
        dimension.change(5 * S, a, |counts| counts.live -= 1);
        let at = |s| s * S;
        assert_eq!(opened(&mut dimension, at(604), 3), (OTHER, None), "at 5 s");
        assert_eq!(opened(&mut dimension, at(605), 3), (a, Some(a)));
        assert_eq!(dimension.value(a), Some(3));
        assert_eq!(dimension.find(1), None);
        assert_eq!(dimension.evicted, 1);
    }

    #[test]
    fn the_lowest_rank_ends_first() {
        let mut dimension = Dimension::<u8>::new(3);
        let mut add = |value, rank| dimension.row_for(0, value, rank, None).0;
        let listening = add(1, Rank::Listening);
        let used = add(2, Rank::Opened);
        let failed = add(3, Rank::Failed);
        let now = 600 * S;
        let mut next = |value, over| dimension.row_for(now, value, Rank::Listening, over).1;
        assert_eq!(next(4, None), None);
        assert_eq!(next(4, Some(Rank::Opened)), Some(failed));
        assert_eq!(next(5, Some(Rank::Failed)), None);
        assert_eq!(next(5, Some(Rank::Opened)), Some(used));
        assert_eq!(next(6, Some(Rank::Opened)), None);
        assert_eq!(next(6, ANY), Some(listening));
    }

    #[test]
    fn a_row_rises_in_rank_and_stays() {
        let mut dimension = Dimension::<u8>::new(1);
        let (row, _) = dimension.row_for(0, 1, Rank::Failed, None);
        assert_eq!(opened(&mut dimension, 0, 1), (row, None));
        dimension.row_for(0, 1, Rank::Failed, None);
        let over = Some(Rank::Failed);
        let late = dimension.row_for(9_999 * S, 2, Rank::Failed, over);
        assert_eq!(late, (OTHER, None), "a failed one ends no used one");
    }

    #[test]
    fn pinned_rows_are_beyond_the_bound() {
        let mut dimension = Dimension::<u8>::new(1);
        let pinned = dimension.pin(0, 9);
        assert_eq!(dimension.pin(0, 9), pinned);
        assert_ne!(opened(&mut dimension, 0, 1).0, OTHER);
        assert_eq!(opened(&mut dimension, 0, 2), (OTHER, None));
        assert_eq!(dimension.rows().count(), 3);
        dimension.end_where(|value| value == 1);
        assert_ne!(opened(&mut dimension, 0, 2).0, OTHER);
        assert_eq!(dimension.evicted, 1);
    }
}
