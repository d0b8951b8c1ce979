//! Messages of NETLINK_SOCK_DIAG: requests, and answers to rows. Parsing is a
//! total function over bytes.
//!
//! The request is `struct inet_diag_req`, the answers are `struct inet_diag_msg`
//! with `struct tcp_info` as an attribute (include/uapi/linux/inet_diag.h and
//! tcp.h). Both only ever grow at the end.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use connmon_common::state;
use connmon_core::event::{SYN_BYTES, Traffic, Tuple};
use connmon_core::scan::Row;

use crate::reconcile::parsed::{Parsed, bare_row, without_row};

/// Which sockets a dump asks for: a bit `1 << state` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States(u32);

impl States {
    /// Listeners. The kernel reads only its table of listeners for these.
    pub const LISTEN: Self = Self(1 << state::LISTEN);
    /// Open connections. FIN_WAIT2 also brings TIME_WAIT minisocks in that
    /// substate, which the parser leaves out.
    pub const OPEN: Self = Self(
        1 << state::ESTABLISHED
            | 1 << state::FIN_WAIT1
            | 1 << state::FIN_WAIT2
            | 1 << state::CLOSE_WAIT
            | 1 << state::LAST_ACK
            | 1 << state::CLOSING,
    );
    /// Handshakes. SYN_RECV brings request sockets (`tcp_diag_dump` adds
    /// NEW_SYN_RECV itself).
    pub const OPENING: Self = Self(1 << state::SYN_SENT | 1 << state::SYN_RECV);

    /// Both sets.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether `state` is asked for.
    pub fn has(self, state: u8) -> bool {
        1_u32.checked_shl(u32::from(state)).unwrap_or(0) & self.0 != 0
    }
}

/// What one datagram of answers held, beside its rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Datagram {
    /// The dump has ended, well or not.
    pub done: bool,
    /// The kernel's error, a positive errno.
    pub error: Option<i32>,
    /// NLM_F_DUMP_INTR was set: the table changed in a way that makes the
    /// dump unreliable.
    pub interrupted: bool,
    /// Messages that did not parse and were skipped.
    pub undecodable: u64,
    /// The sink asked to stop.
    pub stopped: bool,
}

/// Parses one datagram of answers to the request numbered `sequence`; answers
/// to other requests are ignored. `sink` gets each row and returns whether to
/// go on.
pub fn parse_datagram(
    mut bytes: &[u8],
    sequence: u32,
    sink: &mut impl FnMut(Row) -> bool,
) -> Datagram {
    let mut outcome = Datagram::default();
    while !bytes.is_empty() {
        let Some(header) = Header::parse(bytes) else {
            // Where the next message starts is not known.
            outcome.undecodable += 1;
            break;
        };
        let payload = &bytes[HEADER_BYTES..header.length];
        bytes = &bytes[align(header.length).min(bytes.len())..];
        if header.sequence != sequence {
            continue;
        }
        outcome.interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
        match header.kind {
            SOCK_DIAG_BY_FAMILY | TCPDIAG_GETSOCK => match parse_message(payload) {
                Parsed::Row(row) => {
                    if !sink(row) {
                        outcome.stopped = true;
                        return outcome;
                    }
                }
                Parsed::LeftOut => {}
                Parsed::Undecodable => outcome.undecodable += 1,
            },
            NLMSG_ERROR | NLMSG_DONE => {
                // Both begin with zero or a negative errno.
                outcome.done = true;
                let code = read_u32(payload, 0).unwrap_or(0).cast_signed();
                if code != 0 {
                    outcome.error = Some(code.checked_abs().unwrap_or(i32::MAX));
                }
                return outcome;
            }
            NLMSG_OVERRUN => {
                outcome.done = true;
                outcome.error = Some(libc::ENOBUFS);
                return outcome;
            }
            NLMSG_NOOP => {}
            _ => outcome.undecodable += 1,
        }
    }
    outcome
}

/// Parses an `inet_diag_msg` and its attributes, without the netlink header.
pub fn parse_message(payload: &[u8]) -> Parsed {
    row(payload).unwrap_or(Parsed::Undecodable)
}

/// The message that asks for a dump of IPv4 and IPv6. Only this older request
/// takes both at once (family 0); two dumps of a family each go over all
/// sockets twice.
pub(super) fn request(states: States, traffic: bool, sequence: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[0..4].copy_from_slice(&(REQUEST_BYTES as u32).to_ne_bytes());
    bytes[4..6].copy_from_slice(&TCPDIAG_GETSOCK.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    let body = &mut bytes[HEADER_BYTES..];
    body[3] = if traffic {
        1 << (INET_DIAG_INFO - 1)
    } else {
        0
    };
    body[52..56].copy_from_slice(&states.0.to_ne_bytes());
    bytes
}

struct Header {
    /// Header included; at most what is there.
    length: usize,
    kind: u16,
    flags: u16,
    sequence: u32,
}

impl Header {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let length = usize::try_from(read_u32(bytes, 0)?).ok()?;
        let header = Self {
            length,
            kind: read_u16(bytes, 4)?,
            flags: read_u16(bytes, 6)?,
            sequence: read_u32(bytes, 8)?,
        };
        (HEADER_BYTES..=bytes.len())
            .contains(&length)
            .then_some(header)
    }
}

fn row(payload: &[u8]) -> Option<Parsed> {
    let (message, attributes) = payload.split_at_checked(DIAG_MESSAGE_BYTES)?;
    let [family, state, timer, ..] = *message else {
        return None;
    };
    if let Some(other) = without_row(state, timer.into()) {
        return Some(other);
    }
    let address = |at: usize| -> Option<IpAddr> {
        let bytes = message.get(at..)?;
        match family {
            AF_INET => Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into()),
            AF_INET6 => {
                let address = Ipv6Addr::from(*bytes.first_chunk::<16>()?);
                Some(IpAddr::V6(address).to_canonical())
            }
            _ => None,
        }
    };
    let port = |at| read_u16(message, at).map(u16::from_be);
    let tuple = Tuple {
        local: address(8)?,
        local_port: port(4)?,
        remote: address(24)?,
        remote_port: port(6)?,
    };
    let cookie = u64::from(read_u32(message, 44)?) | u64::from(read_u32(message, 48)?) << 32;
    let queued = read_u32(message, 60)?;
    Some(Parsed::Row(Row {
        // INET_DIAG_NOCOOKIE
        cookie: if cookie == u64::MAX { 0 } else { cookie },
        receive_queue: read_u32(message, 56)?,
        send_queue: queued,
        inode: read_u32(message, 68)?,
        traffic: attribute(attributes, INET_DIAG_INFO)
            .and_then(|info| self::traffic(state, queued, info)),
        ..bare_row(state, tuple)
    }))
}

/// The payload of the first attribute of a type.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(read_u16(bytes, 0)?);
        let kind = read_u16(bytes, 2)? & NLA_TYPE_MASK;
        let payload = bytes.get(4..length)?;
        if kind == wanted {
            return Some(payload);
        }
        bytes = bytes.get(align(length)..)?;
    }
}

/// `struct tcp_info` to counters of payload; `queued` is `idiag_wqueue`, what
/// was written and not acknowledged.
///
/// Sent is what was acknowledged and what is in transit (`snd_nxt - snd_una`),
/// as when a connection closes: bytes_sent counts a segment once more that our
/// own queue or a filter has dropped. A FIN is in both where it was sent: in the
/// states after a close, once nothing is left to send. The kernel reads the
/// queue before it takes the socket's lock, and the rest after
/// (`tcp_diag_get_info`), so an ACK in between would count twice: nothing is in
/// transit without a packet, and no more was sent than transmitted.
///
/// bytes_received counts the peer's FIN as one byte. It was received in
/// CLOSE_WAIT, LAST_ACK and CLOSING, and in no other state (`tcp_fin`).
pub(super) fn traffic(row_state: u8, queued: u32, info: &[u8]) -> Option<Traffic> {
    let (fin_received, fin_written) = match row_state {
        state::ESTABLISHED => (0, 0),
        state::FIN_WAIT1 | state::FIN_WAIT2 => (0, 1),
        state::CLOSE_WAIT => (1, 0),
        state::LAST_ACK | state::CLOSING => (1, 1),
        _ => return None,
    };
    let unsent = read_u32(info, TCPI_NOTSENT_BYTES)?;
    let in_transit = match read_u32(info, TCPI_UNACKED)? {
        0 => 0,
        _ => queued.saturating_sub(unsent),
    };
    let fin_sent = if unsent == 0 { fin_written } else { 0 };
    let sent = read_u64(info, TCPI_BYTES_ACKED)?
        .saturating_add(in_transit.into())
        .saturating_sub(fin_sent);
    let transmitted =
        read_u64(info, TCPI_BYTES_SENT)?.saturating_sub(read_u64(info, TCPI_BYTES_RETRANS)?);
    Some(Traffic {
        received_bytes: read_u64(info, TCPI_BYTES_RECEIVED)?.saturating_sub(fin_received),
        sent_bytes: sent.min(transmitted.saturating_add(SYN_BYTES)),
        retransmitted_segments: read_u32(info, TCPI_TOTAL_RETRANS)?,
        srtt_us: read_u32(info, TCPI_RTT)?,
    })
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// NLMSG_ALIGN and NLA_ALIGN.
pub(super) const fn align(length: usize) -> usize {
    (length + 3) & !3
}

// include/uapi/linux/netlink.h, sock_diag.h and inet_diag.h.
pub(super) const HEADER_BYTES: usize = 16;
/// With `struct inet_diag_req`: 4 bytes, `inet_diag_sockid`, states, dbs.
pub(super) const REQUEST_BYTES: usize = HEADER_BYTES + 60;
pub(super) const DIAG_MESSAGE_BYTES: usize = 72;
const NLM_F_REQUEST: u16 = 0x1;
pub(super) const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_NOOP: u16 = 1;
pub(super) const NLMSG_ERROR: u16 = 2;
pub(super) const NLMSG_DONE: u16 = 3;
pub(super) const NLMSG_OVERRUN: u16 = 4;
/// The kind of answers to the newer request, as in the recordings.
pub(super) const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// The kind of our request, and of its answers.
const TCPDIAG_GETSOCK: u16 = 18;
const NLA_TYPE_MASK: u16 = 0x3fff;
pub(super) const INET_DIAG_INFO: u16 = 2;
pub(super) const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

// Offsets in `struct tcp_info`, include/uapi/linux/tcp.h.
pub(super) const TCPI_UNACKED: usize = 24;
pub(super) const TCPI_RTT: usize = 68;
pub(super) const TCPI_TOTAL_RETRANS: usize = 100;
pub(super) const TCPI_BYTES_ACKED: usize = 120;
pub(super) const TCPI_BYTES_RECEIVED: usize = 128;
pub(super) const TCPI_NOTSENT_BYTES: usize = 144;
pub(super) const TCPI_BYTES_SENT: usize = 200;
pub(super) const TCPI_BYTES_RETRANS: usize = 208;
