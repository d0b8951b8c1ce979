//! The records of the kernel's socket iterator → rows.
//!
//! What is read is [`crate::kernel::SocketIterator`]'s, which also names the
//! minimum kernel.

use std::io::{self, Read};

use super::Row;
use crate::event::{self, LiveSocket, Owner};

/// How a reading ended.
#[derive(Debug)]
pub enum Ended {
    /// Every socket was delivered once.
    Complete,
    /// The sink asked to stop.
    Stopped,
    /// Cut short; what was delivered is true all the same.
    Broken(io::Error),
}

/// Reads an iterator to its end; `sink` gets each row and says whether to go
/// on. `buffer` must be longer than any record.
pub fn read_all(
    mut iterator: impl Read,
    buffer: &mut [u8],
    mut sink: impl FnMut(Row) -> bool,
) -> Ended {
    let mut filled = 0;
    loop {
        let Some(room) = buffer.get_mut(filled..).filter(|room| !room.is_empty()) else {
            return Ended::Broken(io::Error::other("a record longer than the buffer"));
        };
        match iterator.read(room) {
            Ok(0) if filled == 0 => return Ended::Complete,
            Ok(0) => return Ended::Broken(io::Error::from(io::ErrorKind::UnexpectedEof)),
            Ok(read) => filled += read,
            // A million sockets in a row that the program left out.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Ended::Broken(error),
        }
        let mut series = &buffer[..filled];
        loop {
            match event::decode_live(series) {
                Ok(Some((socket, length))) => {
                    series = &series[length..];
                    if !sink(row(socket)) {
                        return Ended::Stopped;
                    }
                }
                Ok(None) => break,
                Err(error) => return Ended::Broken(io::Error::other(error)),
            }
        }
        // A record of which the rest is still to come.
        let rest = series.len();
        buffer.copy_within(filled - rest..filled, 0);
        filled = rest;
    }
}

/// Inode and queues are of use for listeners only, of which there are none.
fn row(socket: LiveSocket) -> Row {
    Row {
        state: socket.state,
        tuple: socket.tuple,
        cookie: socket.cookie,
        inode: 0,
        receive_queue: 0,
        send_queue: 0,
        traffic: socket.traffic,
        owner: Owner::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use connmon_common::state;
    use connmon_common::wire::kind;

    /// An IPv4 record with this cookie.
    fn record(cookie: u64) -> Vec<u8> {
        let mut record = vec![kind::LIVE, 0, state::ESTABLISHED, state::ESTABLISHED];
        record.extend([0; 12]);
        record.extend(cookie.to_ne_bytes());
        record.extend([0; 48]);
        assert_eq!(record.len(), 72);
        record
    }

    /// Gives what it is told, a read at a time.
    struct Script(Vec<io::Result<Vec<u8>>>);

    impl Read for Script {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            match self.0.is_empty() {
                true => Ok(0),
                false => self.0.remove(0).map(|bytes| {
                    into[..bytes.len()].copy_from_slice(&bytes);
                    bytes.len()
                }),
            }
        }
    }

    fn cookies(script: Vec<io::Result<Vec<u8>>>) -> (Vec<u64>, Ended) {
        let mut cookies = Vec::new();
        let mut buffer = [0; 200];
        let ended = read_all(Script(script), &mut buffer, |row| {
            cookies.push(row.cookie);
            true
        });
        (cookies, ended)
    }

    #[test]
    fn records_are_whole_however_reads_cut_them() {
        let series = [record(1), record(2), record(3)].concat();
        for cut in 1..series.len() {
            let (first, second) = series.split_at(cut);
            let pieces = [first, second].map(|half| half.chunks(50).map(|piece| Ok(piece.into())));
            let (seen, ended) = cookies(pieces.into_iter().flatten().collect());
            assert!(matches!(ended, Ended::Complete), "{cut}: {ended:?}");
            assert_eq!(seen, [1, 2, 3], "{cut}");
        }
    }

    #[test]
    fn what_is_no_end_is_told() {
        let again = || Err(io::ErrorKind::WouldBlock.into());
        let (seen, ended) = cookies(vec![again(), Ok(record(1)), again(), Ok(record(2))]);
        assert!(matches!(ended, Ended::Complete) && seen == [1, 2]);
        let no_memory = || Err(io::Error::from_raw_os_error(libc::ENOMEM));
        let (seen, ended) = cookies(vec![Ok(record(1)), no_memory()]);
        assert!(matches!(ended, Ended::Broken(_)) && seen == [1]);
        let (seen, ended) = cookies(vec![Ok(record(1)), Ok(record(2)[..70].into())]);
        assert!(matches!(ended, Ended::Broken(_)) && seen == [1]);
        let (_, ended) = cookies(vec![Ok(vec![0; 72])]);
        assert!(matches!(ended, Ended::Broken(_)));
    }

    #[test]
    fn a_sink_that_has_enough_ends_it() {
        let series = [record(1), record(2)].concat();
        let ended = read_all(&series[..], &mut [0; 200], |_| false);
        assert!(matches!(ended, Ended::Stopped));
    }
}
