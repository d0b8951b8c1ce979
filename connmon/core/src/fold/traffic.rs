//! Bytes, retransmits and round-trip times: differences between what the
//! kernel's counters of a socket say now and what they said at the last look.
//!
//! A connection opened before our eyes starts at zero. A seed starts at the
//! first row that has figures, so that what moved before start is not
//! counted, and adds nothing if it closes before one came.
//!
//! Round-trip times: each observation of a connection's smoothed RTT stands
//! for bytes that moved since the last one. A sample observes it if a byte
//! moved since the sample before, a close if a byte moved since the last
//! observation or there was none. An idle connection is thus not counted
//! again and again, and a short one exactly once.

use connmon_common::state::{ESTABLISHED, FIN_WAIT1, FIN_WAIT2};

use crate::event::Traffic;

use super::Fold;
use super::ledger::Place;
use super::table::{Flags, Slot};

/// Nanoseconds in a microsecond.
const US: u64 = 1_000;

impl Fold {
    /// The final figures, from the close itself.
    pub(super) fn final_traffic(&mut self, now_ns: u64, slot: Slot, traffic: &Traffic) {
        if !self.config.traffic {
            return;
        }
        let entry = self.table.entry_mut(slot);
        let place = Place::of(entry);
        let mut moved = 0;
        if entry.flags.has(Flags::BASELINE) {
            let received = entry.advance_received(traffic.received_bytes);
            let sent = entry.advance_sent(traffic.sent_bytes);
            let retransmitted = entry.advance_retransmitted(traffic.retransmitted_segments);
            moved = received + sent;
            self.ledger
                .moved(now_ns, place, received, sent, retransmitted);
        }
        let observed = self.table.entry(slot).flags.has(Flags::RTT);
        if traffic.srtt_us > 0 && (moved > 0 || !observed) {
            self.ledger
                .round_trip(now_ns, place, u64::from(traffic.srtt_us) * US);
        }
    }

    /// The figures of a live connection, from a row that no event is newer
    /// than. Received bytes count in ESTABLISHED, FIN_WAIT1 and FIN_WAIT2
    /// only: elsewhere a FIN may be among them (kernel-notes §5).
    pub(super) fn sample_traffic(&mut self, now_ns: u64, slot: Slot, state: u8, traffic: &Traffic) {
        if !self.config.traffic {
            return;
        }
        let entry = self.table.entry_mut(slot);
        let place = Place::of(entry);
        let first = !entry.flags.has(Flags::BASELINE);
        entry.flags.set(Flags::BASELINE);
        let received = if first || matches!(state, ESTABLISHED | FIN_WAIT1 | FIN_WAIT2) {
            entry.advance_received(traffic.received_bytes)
        } else {
            0
        };
        let sent = entry.advance_sent(traffic.sent_bytes);
        let retransmitted = entry.advance_retransmitted(traffic.retransmitted_segments);
        if first {
            return;
        }
        if received + sent > 0 && traffic.srtt_us > 0 {
            entry.flags.set(Flags::RTT);
            self.ledger
                .round_trip(now_ns, place, u64::from(traffic.srtt_us) * US);
        }
        self.ledger
            .moved(now_ns, place, received, sent, retransmitted);
    }
}
