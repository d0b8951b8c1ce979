//! The end of a walk: finds the entries that it did not show.

use connmon_common::state::SYN_SENT;

use super::Fold;
use super::entry::Flags;
use super::table::Slot;
use super::walk::{Coverage, NAMESPACES_MAX, Progress};

/// Slots looked at by one [`Fold::sweep`]: about 100 µs.
const SLICE: Slot = 8192;

/// After this long an audit removes a pending active open: ten minutes, far
/// longer than the default SYN retries, so its close was missed. If it
/// completes nevertheless, only its latency is lost.
const PENDING_NS: u64 = 600 * 1_000_000_000;

impl Fold {
    /// Looks at the next slots for entries that the walk did not show; true
    /// while there are more. The caller drains the ring between two calls.
    pub fn sweep(&mut self, now_ns: u64) -> bool {
        self.counters.now_ns = now_ns;
        let sweeping = |progress: &mut Box<Progress>| progress.sweep.is_some();
        let Some(mut progress) = self.progress.take_if(sweeping) else {
            return false;
        };
        let first = progress.sweep.unwrap_or(0);
        let end = self.table.end();
        let last = first.saturating_add(SLICE).min(end);
        for slot in first..last {
            if self.table.entry(slot).flags.contains(Flags::USED) {
                self.sweep_entry(&mut progress, slot);
            }
        }
        if last < end {
            progress.sweep = Some(last);
            self.progress = Some(progress);
            return true;
        }
        if self.tombstones.forgotten() > 0 {
            // A row may have added one whose close was forgotten.
            self.absences.lost();
        }
        if progress.audit {
            let table = &self.table;
            self.absences.audit_ends(progress.all_complete, |slot| {
                table.entry(slot).flags.contains(Flags::MISSED)
            });
            self.totals.drift = Some(progress.drift);
            self.totals.drift_suspected = Some(progress.suspects);
            self.totals.unlisted_namespaces = progress.unlisted.len() as u32;
        }
        false
    }

    fn sweep_entry(&mut self, progress: &mut Progress, slot: Slot) {
        let (polling, now_ns) = (self.config.polling, self.counters.now_ns);
        let entry = self.table.entry_mut(slot);
        if entry.is_pending() {
            debug_assert_eq!(entry.state(), SYN_SENT);
            if now_ns.saturating_sub(entry.since_ns) > PENDING_NS {
                self.table.remove(slot);
            }
            return;
        }
        entry.forget_walk_identity();
        if entry.epoch == self.epoch {
            return;
        }
        let missed = entry.flags.contains(Flags::MISSED);
        if !missed {
            self.absences.missed(slot, entry);
        }
        // Epochs recur: a later one must not equal this old one.
        entry.epoch = 0;
        let netns = entry.key.netns;
        let coverage = progress.coverage(netns);
        let gone = match coverage {
            Coverage::Complete if polling || missed => true,
            Coverage::Complete => {
                entry.flags.insert(Flags::MISSED);
                progress.suspects += 1;
                false
            }
            Coverage::Incomplete => false,
            // A failed read is no close.
            Coverage::Unread => progress.evict && !polling && progress.listed,
            Coverage::Unlisted => (progress.evict || polling) && progress.listed,
        };
        if !gone {
            let is_unlisted = coverage == Coverage::Unlisted && progress.listed && netns != 0;
            if is_unlisted && progress.unlisted.len() < NAMESPACES_MAX {
                progress.unlisted.insert(netns);
            }
        } else if polling {
            self.close_entry(slot, now_ns, None, false);
        } else {
            self.totals.corrections.removed += 1;
            progress.drift += 1;
            self.absences.removed(now_ns, slot, self.table.entry(slot));
            self.untrack(slot, false);
        }
    }
}
