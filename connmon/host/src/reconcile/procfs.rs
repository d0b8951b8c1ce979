//! `/proc/<pid>/net/tcp{,6}` to rows. Parsing is total: a line that is
//! malformed, truncated, too long or not text is counted and skipped.
//!
//! The formats are `tcp4_seq_show` (net/ipv4/tcp_ipv4.c) and `tcp6_seq_show`
//! (net/ipv6/tcp_ipv6.c). Each file lists its listeners before its other
//! sockets.

use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use connmon_core::event::Tuple;
use connmon_core::scan::Row;

use super::parsed::{Parsed, bare_row, without_row};

/// The address family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// AF_INET.
    V4,
    /// AF_INET6, v4-mapped sockets included.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Its file in `/proc/<pid>/net`.
    pub fn file(self) -> &'static str {
        match self {
            Self::V4 => "tcp",
            Self::V6 => "tcp6",
        }
    }
}

/// Parses one line, without its line feed, of `tcp` or `tcp6`; the length of
/// the addresses distinguishes them.
pub fn parse_line(line: &[u8]) -> Parsed {
    if line.trim_ascii_start().starts_with(b"sl ") {
        return Parsed::LeftOut;
    }
    row(line).unwrap_or(Parsed::Undecodable)
}

/// Reads a whole table. `sink` gets each row and returns whether to go on; the
/// count of undecodable lines is added to `undecodable`, also when reading
/// fails half-way.
///
/// # Errors
/// Whatever reading the file gives; rows before it have been delivered.
pub fn read_table(
    mut file: impl Read,
    undecodable: &mut u64,
    mut sink: impl FnMut(Row) -> bool,
) -> io::Result<()> {
    // The kernel hands out at most one page a read, whatever is asked for.
    let mut buffer = vec![0_u8; BUFFER_BYTES];
    let mut filled = 0;
    // Inside a line longer than the buffer, whose head is already dropped.
    let mut skipping = false;
    loop {
        let read = match file.read(&mut buffer[filled..]) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if read == 0 {
            // The kernel ends every line; one without an end is cut short.
            *undecodable += u64::from(filled > 0 && !skipping);
            return Ok(());
        }
        filled += read;
        let mut start = 0;
        while let Some(length) = buffer[start..filled].iter().position(|&b| b == b'\n') {
            let line = &buffer[start..start + length];
            start += length + 1;
            if std::mem::take(&mut skipping) {
                continue;
            }
            match parse_line(line) {
                Parsed::Row(row) => {
                    if !sink(row) {
                        return Ok(());
                    }
                }
                Parsed::LeftOut => {}
                Parsed::Undecodable => *undecodable += 1,
            }
        }
        buffer.copy_within(start..filled, 0);
        filled -= start;
        if filled == buffer.len() {
            *undecodable += u64::from(!skipping);
            skipping = true;
            filled = 0;
        }
    }
}

/// Twice a page and the longest line (about 200 bytes).
const BUFFER_BYTES: usize = 8192;

fn row(line: &[u8]) -> Option<Parsed> {
    let mut fields = line
        .split(|byte| byte.is_ascii_whitespace())
        .filter(|field| !field.is_empty());
    let slot = fields.next()?;
    let _number = decimal(slot.strip_suffix(b":")?)?;
    let (local, local_port) = endpoint(fields.next()?)?;
    let (remote, remote_port) = endpoint(fields.next()?)?;
    let state = match fields.next()? {
        two @ [_, _] => u8::try_from(hex(two)?).ok()?,
        _ => return None,
    };
    let (send_queue, receive_queue) = pair(fields.next()?)?;
    let (timer, _when) = pair(fields.next()?)?;
    let _retransmits = hex(fields.next()?)?;
    let _uid = decimal(fields.next()?)?;
    let _probes = decimal(fields.next()?)?;
    let inode = u32::try_from(decimal(fields.next()?)?).ok()?;
    if let Some(other) = without_row(state, timer) {
        return Some(other);
    }
    if local.is_ipv6() != remote.is_ipv6() {
        return None;
    }
    let tuple = Tuple {
        local: local.to_canonical(),
        local_port,
        remote: remote.to_canonical(),
        remote_port,
    };
    Some(Parsed::Row(Row {
        inode,
        receive_queue,
        send_queue,
        ..bare_row(state, tuple)
    }))
}

/// `%08X:%04X` or four such words and a port. A word is the big-endian
/// address read as a host-order integer, hence `to_ne_bytes`.
fn endpoint(field: &[u8]) -> Option<(IpAddr, u16)> {
    let (address, port) = field.split_at_checked(field.len().checked_sub(5)?)?;
    let port = u16::try_from(hex(port.strip_prefix(b":")?)?).ok()?;
    let address = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(hex(address)?.to_ne_bytes())),
        32 => {
            let mut bytes = [0; 16];
            for (word, into) in address.chunks_exact(8).zip(bytes.chunks_exact_mut(4)) {
                into.copy_from_slice(&hex(word)?.to_ne_bytes());
            }
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some((address, port))
}

/// Two hexadecimal numbers with a colon between.
fn pair(field: &[u8]) -> Option<(u32, u32)> {
    let colon = field.iter().position(|&byte| byte == b':')?;
    Some((hex(&field[..colon])?, hex(&field[colon + 1..])?))
}

/// One to eight hexadecimal digits and nothing else.
fn hex(digits: &[u8]) -> Option<u32> {
    if digits.len() > 8 {
        return None;
    }
    u32::try_from(number(digits, 16)?).ok()
}

/// A decimal number and nothing else.
fn decimal(digits: &[u8]) -> Option<u64> {
    number(digits, 10)
}

/// Unlike `from_str_radix`, without a sign.
fn number(digits: &[u8], radix: u32) -> Option<u64> {
    if !digits.iter().all(u8::is_ascii_alphanumeric) {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, radix).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::parsed::show;
    use super::*;

    const TCP: &str = include_str!("../../../fixtures/proc/tcp");
    const TCP6: &str = include_str!("../../../fixtures/proc/tcp6");
    const MANGLED: &[u8] = include_bytes!("../../../fixtures/proc/mangled");

    fn rows(table: &[u8]) -> (Vec<Row>, u64) {
        let (mut rows, mut undecodable) = (Vec::new(), 0);
        read_table(table, &mut undecodable, |row| {
            rows.push(row);
            true
        })
        .unwrap();
        (rows, undecodable)
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn recorded_tables_read_as_ss_showed_them() {
        let (v4, undecodable) = rows(TCP.as_bytes());
        assert_eq!(undecodable, 0);
        let shown: Vec<_> = v4.iter().map(show).collect();
        let expected: Vec<_> = include_str!("../../../fixtures/proc/tcp.expected")
            .lines()
            .collect();
        assert_eq!(shown, expected);

        let (v6, undecodable) = rows(TCP6.as_bytes());
        assert_eq!(undecodable, 0);
        let shown: Vec<_> = v6.iter().map(show).collect();
        let expected: Vec<_> = include_str!("../../../fixtures/proc/tcp6.expected")
            .lines()
            .collect();
        assert_eq!(shown, expected);
    }

    #[test]
    fn malformed_lines_are_counted_one_by_one() {
        let (good, undecodable) = rows(MANGLED);
        let ports: Vec<_> = good.iter().map(|row| row.tuple.local_port).collect();
        // Every good line of the fixture has a local port from 1 on.
        assert_eq!(ports, [1, 2, 3, 4]);
        let lines = MANGLED.split_inclusive(|&b| b == b'\n').count() as u64;
        assert_eq!(undecodable, lines - 1 - 4, "all but the header and those");
    }

    #[test]
    fn a_line_longer_than_any_buffer_costs_itself_alone() {
        let good = TCP.lines().nth(1).unwrap();
        let mut table = vec![b'x'; 3 * BUFFER_BYTES];
        table.extend_from_slice(format!("\n{good}\n").as_bytes());
        let (rows, undecodable) = rows(&table);
        assert_eq!((rows.len(), undecodable), (1, 1));
    }

    #[test]
    fn the_sink_can_stop_the_reading() {
        let mut seen = 0;
        read_table(TCP.as_bytes(), &mut 0, |_| {
            seen += 1;
            false
        })
        .unwrap();
        assert_eq!(seen, 1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_some_line(line in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_line(&line);
        }

        #[test]
        fn any_cut_or_flipped_byte_is_survived(
            index in 1_usize..7,
            cut in 0_usize..200,
            at in 0_usize..200,
            byte in any::<u8>(),
        ) {
            for table in [TCP, TCP6] {
                let mut line = table.lines().nth(index).unwrap().as_bytes().to_vec();
                if let Some(place) = line.get_mut(at) {
                    *place = byte;
                }
                line.truncate(cut.max(1));
                let _ = parse_line(&line);
            }
        }

        #[test]
        fn what_the_kernel_prints_is_what_is_read(
            local in any::<[u8; 16]>(),
            remote in any::<[u8; 16]>(),
            ports in any::<(u16, u16)>(),
            state in prop_oneof![1_u8..=5, 8_u8..=11],
            queues in any::<(u32, u32)>(),
            inode in any::<u32>(),
            v6 in any::<bool>(),
            slot in any::<u32>(),
        ) {
            let width = if v6 { 16 } else { 4 };
            let text = |bytes: &[u8; 16]| -> String {
                bytes[..width]
                    .chunks_exact(4)
                    .map(|word| format!("{:08X}", u32::from_ne_bytes(word.try_into().unwrap())))
                    .collect()
            };
            let line = format!(
                "{slot:4}: {}:{:04X} {}:{:04X} {state:02X} {:08X}:{:08X} 01:00000014 00000000 {:5} {:8} {inode} 2 0000000000000000 20 4 30 10 -1",
                text(&local), ports.0, text(&remote), ports.1, queues.0, queues.1, 1000, 0,
            );
            let address = |bytes: &[u8; 16]| -> IpAddr {
                if v6 {
                    IpAddr::from(*bytes).to_canonical()
                } else {
                    IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]])
                }
            };
            let Parsed::Row(row) = parse_line(line.as_bytes()) else {
                panic!("not a row: {line}");
            };
            prop_assert_eq!(row.tuple, Tuple {
                local: address(&local),
                local_port: ports.0,
                remote: address(&remote),
                remote_port: ports.1,
            });
            prop_assert_eq!((row.state, row.inode), (state, inode));
            prop_assert_eq!((row.send_queue, row.receive_queue), queues);
        }
    }
}
