//! One entry of a socket table, from sock_diag or /proc alike.

use connmon_common::state;
use connmon_core::event::{Owner, Tuple};
use connmon_core::scan::Row;

/// What one entry holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Parsed {
    /// A socket, or with state SYN_RECV mostly a request socket.
    Row(Row),
    /// A TIME_WAIT minisock, a closed socket, or the header of a file.
    LeftOut,
    /// Not an entry of such a table.
    Undecodable,
}

/// The timer of a TIME_WAIT minisock (`inet_twsk_diag_fill`,
/// `get_timewait4_sock`), whatever state it shows; a full socket has 0, 1, 2
/// or 4.
const TIMER_TIME_WAIT: u32 = 3;

/// What an entry with this state and timer is, unless it is a row.
pub(super) fn without_row(state: u8, timer: u32) -> Option<Parsed> {
    match state {
        state::TIME_WAIT | state::CLOSE => Some(Parsed::LeftOut),
        state::ESTABLISHED..=state::CLOSING if timer == TIMER_TIME_WAIT => Some(Parsed::LeftOut),
        state::ESTABLISHED..=state::CLOSING => None,
        _ => Some(Parsed::Undecodable),
    }
}

/// A row without what only some sources know.
pub(super) fn bare_row(state: u8, tuple: Tuple) -> Row {
    Row {
        state,
        tuple,
        id: 0,
        cookie: 0,
        inode: 0,
        receive_queue: 0,
        send_queue: 0,
        traffic: None,
        owner: Owner::default(),
    }
}

/// A row as the `.expected` files beside the recordings have it.
#[cfg(test)]
pub(super) fn show(row: &Row) -> String {
    let Tuple {
        local,
        local_port,
        remote,
        remote_port,
    } = row.tuple;
    format!(
        "{:02} {local} {local_port} {remote} {remote_port} {} {} {}",
        row.state, row.inode, row.receive_queue, row.send_queue
    )
}
