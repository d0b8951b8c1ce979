//! Accepts that came before their connection's handshake ended.
//!
//! A Fast Open child can be accepted while still in SYN_RECV, so its accept
//! comes before its open. The last few accepts of unknown sockets are kept;
//! an open that finds its own among them has waited 0. Accepts of sockets
//! that are unknown for another reason (left out by a filter, older than the
//! agent, beyond the cap) pass through here too; each goes with the next
//! birth or close at its address, so that no later socket there finds it.

use crate::event::SocketId;

/// How many accepts of unknown sockets are kept.
const KEPT: usize = 64;

/// A ring of socket addresses; 0 is an empty place.
#[derive(Debug)]
pub(super) struct EarlyAccepts {
    ids: [SocketId; KEPT],
    next: usize,
    kept: usize,
}

impl EarlyAccepts {
    pub(super) fn new() -> Self {
        Self {
            ids: [0; KEPT],
            next: 0,
            kept: 0,
        }
    }

    pub(super) fn keep(&mut self, id: SocketId) {
        let place = &mut self.ids[self.next];
        self.kept += usize::from(*place == 0);
        *place = id;
        self.next = (self.next + 1) % KEPT;
    }

    /// Whether `id` was accepted early; forgets it.
    pub(super) fn take(&mut self, id: SocketId) -> bool {
        if self.kept == 0 {
            return false;
        }
        match self.ids.iter_mut().find(|kept| **kept == id) {
            Some(kept) => {
                *kept = 0;
                self.kept -= 1;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_few_are_kept() {
        let mut accepts = EarlyAccepts::new();
        assert!(!accepts.take(1));
        for id in 1..=65 {
            accepts.keep(id);
        }
        assert!(!accepts.take(1), "overwritten");
        assert!(accepts.take(2) && !accepts.take(2));
        for id in 3..=65 {
            assert!(accepts.take(id));
        }
        assert_eq!(accepts.kept, 0);
    }
}
