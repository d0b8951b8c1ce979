//! Bytes, retransmits and round-trip times: how much the kernel's counters of
//! a socket rose since they were last read.
//!
//! The counters of a connection whose open was seen begin at zero. Those of a
//! seed begin at the first row that has them, so that nothing from before the
//! start is counted.
//!
//! The smoothed round-trip time is observed only for bytes that moved: in a
//! sample if some moved since the last sample, at close if some moved since the
//! last observation, or there was none. So an idle connection is not observed
//! repeatedly, and a short one exactly once.

use connmon_common::state::{ESTABLISHED, FIN_WAIT1, FIN_WAIT2};

use super::Fold;
use super::counters::Labels;
use super::entry::Flags;
use super::table::Slot;
use crate::event::Traffic;

impl Fold {
    /// The final values, from the close itself.
    pub(super) fn final_traffic(&mut self, slot: Slot, traffic: &Traffic) {
        if !self.config.traffic {
            return;
        }
        let entry = self.table.entry_mut(slot);
        let observed = entry.flags.contains(Flags::RTT);
        let moved =
            entry.flags.contains(Flags::BASELINE) && self.count_traffic(slot, traffic, true);
        if moved || !observed {
            self.observe_rtt(slot, traffic);
        }
    }

    /// The values of a live connection, from a row that is newer than its last
    /// event.
    pub(super) fn sample_traffic(&mut self, slot: Slot, state: u8, traffic: &Traffic) {
        if !self.config.traffic {
            return;
        }
        let entry = self.table.entry_mut(slot);
        if !entry.flags.contains(Flags::BASELINE) {
            entry.flags.insert(Flags::BASELINE);
            entry.baseline.advance_received(traffic.received_bytes);
            entry.baseline.advance_sent(traffic.sent_bytes);
            entry
                .baseline
                .advance_retransmitted(traffic.retransmitted_segments);
            return;
        }
        // In other states the kernel may count a FIN (kernel-notes §5).
        let received = matches!(state, ESTABLISHED | FIN_WAIT1 | FIN_WAIT2);
        if self.count_traffic(slot, traffic, received) && self.observe_rtt(slot, traffic) {
            self.table.entry_mut(slot).flags.insert(Flags::RTT);
        }
    }

    /// Counts what moved, received bytes only if `received`; true if any byte
    /// did.
    fn count_traffic(&mut self, slot: Slot, now: &Traffic, received: bool) -> bool {
        let entry = self.table.entry_mut(slot);
        let labels = Labels::of(entry);
        let received = if received {
            entry.baseline.advance_received(now.received_bytes)
        } else {
            0
        };
        let sent = entry.baseline.advance_sent(now.sent_bytes);
        let segments = now.retransmitted_segments;
        let retransmitted = entry.baseline.advance_retransmitted(segments);
        self.counters.moved(labels, received, sent, retransmitted);
        received + sent > 0
    }

    /// False if there is no round-trip time.
    fn observe_rtt(&mut self, slot: Slot, traffic: &Traffic) -> bool {
        if traffic.srtt_us > 0 {
            let labels = Labels::of(self.table.entry(slot));
            let rtt_ns = u64::from(traffic.srtt_us) * 1_000;
            self.counters.round_trip(labels, rtt_ns);
        }
        traffic.srtt_us > 0
    }
}
