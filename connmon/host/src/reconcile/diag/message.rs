//! Messages of NETLINK_SOCK_DIAG: requests, and answers → rows. Parsing is a
//! total function over bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use connmon_common::state;
use connmon_core::event::{Owner, SYN_BYTES, Traffic, Tuple};
use connmon_core::scan::Row;

use super::{Family, States};

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
/// to other requests are ignored. `sink` gets each row and says whether to go
/// on.
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
                Message::Row(row) => {
                    if !sink(row) {
                        outcome.stopped = true;
                        return outcome;
                    }
                }
                Message::LeftOut => {}
                Message::Undecodable => outcome.undecodable += 1,
            },
            NLMSG_ERROR | NLMSG_DONE => {
                // Both begin with a negative errno or zero; DONE came without
                // one before Linux 2.6.
                outcome.done = true;
                let code = read_i32(payload, 0).unwrap_or(0);
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

/// What one `inet_diag_msg` says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Message {
    /// A socket, or with state SYN_RECV mostly a request socket.
    Row(Row),
    /// A TIME_WAIT minisock or a socket that closed while the dump went on.
    LeftOut,
    /// Not an `inet_diag_msg`.
    Undecodable,
}

/// Parses an `inet_diag_msg` and its attributes, without the netlink header.
pub fn parse_message(payload: &[u8]) -> Message {
    row(payload).unwrap_or(Message::Undecodable)
}

/// The netlink message that asks for a dump of both families: a
/// `struct inet_diag_req`, whose family 0 is any.
pub(super) fn request_both(states: States, info: bool, sequence: u32) -> [u8; REQUEST_BOTH_BYTES] {
    let mut bytes = message_to_kernel(TCPDIAG_GETSOCK, sequence);
    let body: &mut [u8] = &mut bytes[HEADER_BYTES..];
    body[3] = if info { 1 << (INET_DIAG_INFO - 1) } else { 0 };
    body[52..56].copy_from_slice(&states.0.to_ne_bytes());
    bytes
}

/// The head of a request, the rest zero.
pub(super) fn message_to_kernel<const BYTES: usize>(kind: u16, sequence: u32) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes[0..4].copy_from_slice(&(BYTES as u32).to_ne_bytes());
    bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    bytes
}

/// The netlink message that asks for a dump of one family.
pub(super) fn request(
    family: Family,
    states: States,
    info: bool,
    sequence: u32,
) -> [u8; REQUEST_BYTES] {
    let mut bytes = message_to_kernel(SOCK_DIAG_BY_FAMILY, sequence);
    let body: &mut [u8] = &mut bytes[HEADER_BYTES..];
    body[0] = family.number();
    body[1] = IPPROTO_TCP;
    body[2] = if info { 1 << (INET_DIAG_INFO - 1) } else { 0 };
    body[4..8].copy_from_slice(&states.0.to_ne_bytes());
    bytes
}

pub(super) struct Header {
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

pub(super) fn row(payload: &[u8]) -> Option<Message> {
    let (message, attributes) = payload.split_at_checked(DIAG_MESSAGE_BYTES)?;
    let [family, state, timer, ..] = *message else {
        return None;
    };
    match state {
        state::TIME_WAIT | state::CLOSE => return Some(Message::LeftOut),
        state::ESTABLISHED..=state::CLOSING => {}
        _ => return None,
    }
    if timer == TIMER_TIME_WAIT {
        return Some(Message::LeftOut);
    }
    let address = |at: usize| -> Option<IpAddr> {
        match family {
            AF_INET => {
                let bytes: [u8; 4] = message.get(at..at + 4)?.try_into().ok()?;
                Some(Ipv4Addr::from(bytes).into())
            }
            AF_INET6 => {
                let bytes: [u8; 16] = message.get(at..at + 16)?.try_into().ok()?;
                Some(IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical())
            }
            _ => None,
        }
    };
    let port = |at: usize| -> Option<u16> {
        Some(u16::from_be_bytes(
            message.get(at..at + 2)?.try_into().ok()?,
        ))
    };
    let cookie = u64::from(read_u32(message, 44)?) | u64::from(read_u32(message, 48)?) << 32;
    Some(Message::Row(Row {
        state,
        tuple: Tuple {
            local: address(8)?,
            local_port: port(4)?,
            remote: address(24)?,
            remote_port: port(6)?,
        },
        id: 0,
        // INET_DIAG_NOCOOKIE
        cookie: if cookie == u64::MAX { 0 } else { cookie },
        receive_queue: read_u32(message, 56)?,
        send_queue: read_u32(message, 60)?,
        inode: read_u32(message, 68)?,
        traffic: attribute(attributes, INET_DIAG_INFO)
            .and_then(|info| traffic(state, read_u32(message, 60)?, info)),
        owner: Owner::default(),
    }))
}

/// The payload of the first attribute of a type.
pub(super) fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
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

/// `struct tcp_info` → payload figures; `queued` is `idiag_wqueue`, what was
/// written and not acknowledged.
///
/// Sent is what was acknowledged and what is on its way (`snd_nxt - snd_una`),
/// as at CLOSE: bytes_sent counts a segment again that our own queue or a
/// filter has dropped. A FIN has been sent where nothing is left to send in the
/// states that one leads to, and then it is among both. The kernel reads the
/// queue before it takes the socket's lock and the rest after
/// (`tcp_diag_get_info`), so what is acknowledged in between would count twice:
/// nothing is on its way without a packet, and no more was sent than
/// transmitted.
///
/// bytes_received counts the peer's FIN as one. CLOSE_WAIT, LAST_ACK and
/// CLOSING are entered by `tcp_fin` alone, which is what sets SOCK_DONE, so
/// there it is taken off just as at CLOSE; FIN_WAIT1, FIN_WAIT2 and
/// ESTABLISHED have not seen a FIN.
pub(super) fn traffic(row_state: u8, queued: u32, info: &[u8]) -> Option<Traffic> {
    let (fin_received, fin_written) = match row_state {
        state::ESTABLISHED => (0, 0),
        state::FIN_WAIT1 | state::FIN_WAIT2 => (0, 1),
        state::CLOSE_WAIT => (1, 0),
        state::LAST_ACK | state::CLOSING => (1, 1),
        _ => return None,
    };
    let unsent = read_u32(info, TCPI_NOTSENT_BYTES)?;
    let on_its_way = match read_u32(info, TCPI_UNACKED)? {
        0 => 0,
        _ => queued.saturating_sub(unsent),
    };
    let fin_sent = if unsent == 0 { fin_written } else { 0 };
    let sent = read_u64(info, TCPI_BYTES_ACKED)?
        .saturating_add(on_its_way.into())
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

pub(super) fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn read_i32(bytes: &[u8], at: usize) -> Option<i32> {
    read_u32(bytes, at).map(u32::cast_signed)
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
pub(super) const REQUEST_BYTES: usize = HEADER_BYTES + 56;
/// With `struct inet_diag_req`: 4 bytes, `inet_diag_sockid`, states, dbs.
pub(super) const REQUEST_BOTH_BYTES: usize = HEADER_BYTES + 60;
pub(super) const DIAG_MESSAGE_BYTES: usize = 72;
pub(super) const NLM_F_REQUEST: u16 = 0x1;
pub(super) const NLM_F_DUMP_INTR: u16 = 0x10;
pub(super) const NLM_F_DUMP: u16 = 0x300;
pub(super) const NLMSG_NOOP: u16 = 1;
pub(super) const NLMSG_ERROR: u16 = 2;
pub(super) const NLMSG_DONE: u16 = 3;
pub(super) const NLMSG_OVERRUN: u16 = 4;
pub(super) const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// The older request, and the kind of its answers.
pub(super) const TCPDIAG_GETSOCK: u16 = 18;
pub(super) const NLA_TYPE_MASK: u16 = 0x3fff;
pub(super) const INET_DIAG_INFO: u16 = 2;
/// `idiag_timer` of a TIME_WAIT minisock (`inet_twsk_diag_fill`).
pub(super) const TIMER_TIME_WAIT: u8 = 3;
pub(super) const AF_INET: u8 = 2;
pub(super) const AF_INET6: u8 = 10;
pub(super) const IPPROTO_TCP: u8 = 6;

// Offsets in `struct tcp_info`, include/uapi/linux/tcp.h.
pub(super) const TCPI_UNACKED: usize = 24;
pub(super) const TCPI_RTT: usize = 68;
pub(super) const TCPI_TOTAL_RETRANS: usize = 100;
pub(super) const TCPI_BYTES_ACKED: usize = 120;
pub(super) const TCPI_BYTES_RECEIVED: usize = 128;
pub(super) const TCPI_NOTSENT_BYTES: usize = 144;
pub(super) const TCPI_BYTES_SENT: usize = 200;
pub(super) const TCPI_BYTES_RETRANS: usize = 208;
