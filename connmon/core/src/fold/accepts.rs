//! Accepts that were reported before the end of the handshake.
//!
//! A Fast Open child can be accepted in SYN_RECV; its wait is then 0. The last
//! accepts of unknown sockets are kept, also where the socket is unknown for
//! another reason (a filter, the table's cap). Each is dropped at the next open
//! or close with its address, so that no later socket there finds it.

use std::collections::VecDeque;

use crate::event::SocketId;

/// Most accepts that are kept.
const MAX: usize = 64;

/// Sockets of unknown connections that were accepted.
#[derive(Debug, Default)]
pub(super) struct EarlyAccepts(VecDeque<SocketId>);

impl EarlyAccepts {
    pub(super) fn keep(&mut self, id: SocketId) {
        if self.0.len() == MAX {
            self.0.pop_front();
        }
        self.0.push_back(id);
    }

    /// Whether `id` was accepted early; drops it.
    pub(super) fn take(&mut self, id: SocketId) -> bool {
        let found = self.0.iter().position(|&kept| kept == id);
        found.and_then(|at| self.0.remove(at)).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_64_are_kept_and_taken_once() {
        let mut accepts = EarlyAccepts::default();
        assert!(!accepts.take(1));
        for id in 1..=65 {
            accepts.keep(id);
        }
        assert!(!accepts.take(1), "overwritten");
        assert!(accepts.take(2) && !accepts.take(2));
        for id in 3..=65 {
            assert!(accepts.take(id));
        }
        assert!(accepts.0.is_empty());
    }
}
