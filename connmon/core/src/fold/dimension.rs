//! One dimension of the counters: a bounded table with one row for each value
//! and a row `other` for the rest.
//!
//! A connection remembers the numbers of its rows. A row with a live
//! connection never ends, so a row number stays valid for as long as a
//! connection refers to it.

use std::collections::HashMap;
use std::hash::Hash;

use super::snapshot::{DIRECTIONS, FailureReason, Flow};

/// A row may end after so long without a connection or a change: ten minutes.
const IDLE_NS: u64 = 600 * 1_000_000_000;

/// Number of the row `other`.
pub(super) const OTHER: u16 = 0;

/// A row number that stands for no row: the dimension is off.
pub(super) const NO_ROW: u16 = u16::MAX;

/// What a dimension counts by.
pub(super) trait Value: Copy + Eq + std::fmt::Debug {
    /// Row by value.
    type Index: Index<Self> + Default + std::fmt::Debug;
    /// What its rows hold beside the flows and failures of every dimension.
    type Extra: Default + std::fmt::Debug;
}

/// Row by value.
pub(super) trait Index<V> {
    /// The row of a value, [`OTHER`] where it has none.
    fn get(&self, value: V) -> u16;
    /// Sets the row of a value; [`OTHER`] removes it.
    fn set(&mut self, value: V, row: u16);
}

/// An index for values without a small number of their own.
impl<V: Eq + Hash> Index<V> for HashMap<V, u16> {
    fn get(&self, value: V) -> u16 {
        HashMap::get(self, &value).copied().unwrap_or(OTHER)
    }

    fn set(&mut self, value: V, row: u16) {
        if row == OTHER {
            self.remove(&value);
        } else {
            self.insert(value, row);
        }
    }
}

/// What speaks for keeping a row. Of the rows that are idle, one of the
/// lowest rank ends first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// No connection to it was ever opened.
    #[default]
    Failed,
    /// A connection was opened, or existed before start.
    Opened,
    /// A listening port.
    Listening,
}

/// The counters of one value.
#[derive(Debug)]
pub(super) struct Row<V: Value> {
    /// `None` for `other` and for a row number that is free.
    value: Option<V>,
    pub(super) flows: [Flow; DIRECTIONS],
    pub(super) failures: [u64; FailureReason::COUNT],
    pub(super) extra: V::Extra,
    /// Tracked connections that refer to this row, in whatever state.
    live: u64,
    changed_ns: u64,
    pub(super) rank: Rank,
}

impl<V: Value> Row<V> {
    fn new(value: Option<V>, now_ns: u64, rank: Rank) -> Self {
        Self {
            value,
            flows: Default::default(),
            failures: Default::default(),
            extra: V::Extra::default(),
            live: 0,
            changed_ns: now_ns,
            rank,
        }
    }

    fn is_idle(&self, now_ns: u64) -> bool {
        self.live == 0 && now_ns.saturating_sub(self.changed_ns) >= IDLE_NS
    }
}

/// The rows of one dimension.
#[derive(Debug)]
pub(super) struct Dimension<V: Value> {
    pub(super) index: V::Index,
    rows: Vec<Row<V>>,
    /// Row numbers of rows that ended.
    free: Vec<u16>,
    /// Rows that were idle at the last search; checked again before use.
    idle: Vec<u16>,
    /// Before this time no further row can have become idle.
    search_again_ns: u64,
    /// Most rows beside `other` and the pinned ones.
    max: usize,
    /// Rows that exist at any number of others and never end.
    pinned: usize,
    /// Connections counted in `other` because every row was taken.
    pub(super) overflow: u64,
    /// Rows that ended.
    pub(super) evicted: u64,
}

impl<V: Value> Dimension<V> {
    /// An empty dimension of at most `max` rows beside `other`.
    pub(super) fn new(max: usize) -> Self {
        Self {
            index: V::Index::default(),
            rows: vec![Row::new(None, 0, Rank::Listening)],
            free: Vec::new(),
            idle: Vec::new(),
            search_again_ns: 0,
            max: max.min(usize::from(NO_ROW) - 1),
            pinned: 0,
            overflow: 0,
            evicted: 0,
        }
    }

    /// The row that `value` counts in: its own, made if there is room or an
    /// idle row up to the rank `over` that may end for it, else `other`. The
    /// second number is the row that ended.
    pub(super) fn row_for(
        &mut self,
        now_ns: u64,
        value: V,
        rank: Rank,
        over: Option<Rank>,
    ) -> (u16, Option<u16>) {
        let row = self.index.get(value);
        if row != OTHER {
            let row_rank = &mut self.rows[usize::from(row)].rank;
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

    /// The row of a value that always has one, beyond the bound of the others.
    pub(super) fn pin(&mut self, now_ns: u64, value: V) -> u16 {
        match self.index.get(value) {
            OTHER => {
                self.pinned += 1;
                self.make_row(now_ns, value, Rank::Listening)
            }
            row => row,
        }
    }

    fn make_row(&mut self, now_ns: u64, value: V, rank: Rank) -> u16 {
        let new = Row::new(Some(value), now_ns, rank);
        let row = match self.free.pop() {
            Some(row) => {
                self.rows[usize::from(row)] = new;
                row
            }
            None => {
                self.rows.push(new);
                (self.rows.len() - 1) as u16
            }
        };
        self.index.set(value, row);
        row
    }

    /// Ends the idle row of the lowest rank, if that is at most `over`.
    fn evict(&mut self, now_ns: u64, over: Rank) -> Option<u16> {
        if now_ns >= self.search_again_ns {
            self.search_idle(now_ns);
        }
        let found = self.find_idle(now_ns, over)?;
        let row = self.idle.swap_remove(found);
        self.end(row);
        Some(row)
    }

    /// Where in `idle` the row of the lowest rank is. Rows that changed since
    /// they were found are dropped from the list.
    fn find_idle(&mut self, now_ns: u64, over: Rank) -> Option<usize> {
        let rows = &self.rows;
        self.idle
            .retain(|&row| rows[usize::from(row)].is_idle(now_ns));
        let rank = |row: u16| rows[usize::from(row)].rank;
        (0..self.idle.len())
            .filter(|&place| rank(self.idle[place]) <= over)
            .min_by_key(|&place| rank(self.idle[place]))
    }

    fn search_idle(&mut self, now_ns: u64) {
        self.search_again_ns = now_ns.saturating_add(IDLE_NS);
        self.idle.clear();
        for (number, row) in (0u16..).zip(&self.rows) {
            if row.value.is_none() || row.live > 0 {
                continue;
            }
            if row.is_idle(now_ns) {
                self.idle.push(number);
            } else {
                let idle_at = row.changed_ns.saturating_add(IDLE_NS);
                self.search_again_ns = self.search_again_ns.min(idle_at);
            }
        }
    }

    fn end(&mut self, row: u16) {
        let ended = &mut self.rows[usize::from(row)];
        debug_assert_eq!(ended.live, 0);
        if let Some(value) = ended.value.take() {
            self.index.set(value, OTHER);
            self.free.push(row);
            self.evicted += 1;
        }
    }

    /// Ends the rows of all values for which `ends` holds.
    pub(super) fn end_where(&mut self, ends: impl Fn(V) -> bool) {
        for row in 0..self.rows.len() as u16 {
            if self.rows[usize::from(row)].value.is_some_and(&ends) {
                self.end(row);
            }
        }
    }

    /// A row that is about to change.
    pub(super) fn change(&mut self, now_ns: u64, row: u16) -> &mut Row<V> {
        let row = self.row_mut(row);
        row.changed_ns = now_ns;
        row
    }

    /// A row for what does not keep it from being idle.
    pub(super) fn row_mut(&mut self, row: u16) -> &mut Row<V> {
        &mut self.rows[usize::from(row)]
    }

    /// A tracked connection refers to `row` from now on.
    pub(super) fn attach(&mut self, now_ns: u64, row: u16) {
        self.change(now_ns, row).live += 1;
    }

    /// A tracked connection no longer refers to `row`.
    pub(super) fn detach(&mut self, now_ns: u64, row: u16) {
        let row = self.change(now_ns, row);
        debug_assert!(row.live > 0);
        row.live = row.live.saturating_sub(1);
    }

    /// The value of a row; `None` for `other`.
    pub(super) fn value(&self, row: u16) -> Option<V> {
        self.rows[usize::from(row)].value
    }

    /// Every row, `other` first, which has no value.
    pub(super) fn rows(&self) -> impl Iterator<Item = (Option<V>, &Row<V>)> {
        let (other, rows) = self.rows.split_at(1);
        let own = rows.iter().filter(|row| row.value.is_some());
        other.iter().chain(own).map(|row| (row.value, row))
    }

    pub(super) fn rows_mut(&mut self) -> impl Iterator<Item = (Option<V>, &mut Row<V>)> {
        self.rows.iter_mut().map(|row| (row.value, row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;
    const ANY: Option<Rank> = Some(Rank::Listening);

    impl Value for u8 {
        type Index = HashMap<u8, u16>;
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
        dimension.attach(0, a);
        dimension.attach(0, b);
        assert_eq!(opened(&mut dimension, S, 3), (OTHER, None));
        dimension.detach(5 * S, a);
        let at = |s| s * S;
        assert_eq!(opened(&mut dimension, at(604), 3), (OTHER, None), "at 5 s");
        assert_eq!(opened(&mut dimension, at(605), 3), (a, Some(a)));
        assert_eq!(dimension.value(a), Some(3));
        assert_eq!(Index::get(&dimension.index, 1), OTHER);
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
