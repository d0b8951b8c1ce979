//! NETLINK_SOCK_DIAG dumps: netlink messages → rows, and the socket that asks
//! for them.
//!
//! Parsing is a total function over bytes. The request is
//! `struct inet_diag_req_v2`, the answers `struct inet_diag_msg` and
//! `struct tcp_info` (include/uapi/linux/inet_diag.h and tcp.h), all of which
//! only ever grow at the end. Minimum kernel: 4.19 for the traffic figures.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use connmon_common::state;
use connmon_core::event::{Owner, SYN_BYTES, Traffic, Tuple};
use connmon_core::scan::Row;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

/// Which sockets a dump asks for: a bit `1 << state` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States(u32);

impl States {
    /// Listeners. The kernel answers from its table of listeners alone.
    pub const LISTEN: Self = Self(1 << state::LISTEN);
    /// Opened connections. FIN_WAIT2 also brings TIME_WAIT minisocks in that
    /// substate, which the parser leaves out.
    pub const OPEN: Self = Self(
        1 << state::ESTABLISHED
            | 1 << state::FIN_WAIT1
            | 1 << state::FIN_WAIT2
            | 1 << state::CLOSE_WAIT
            | 1 << state::LAST_ACK
            | 1 << state::CLOSING,
    );
    /// Handshakes under way. SYN_RECV brings request sockets
    /// (`tcp_diag_dump` adds NEW_SYN_RECV itself).
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

/// Address family of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// AF_INET.
    V4,
    /// AF_INET6, v4-mapped sockets included.
    V6,
}

impl Family {
    /// Both, in the order they are asked for.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The file of `/proc/<pid>/net` with the same sockets.
    pub fn proc_file(self) -> &'static str {
        match self {
            Self::V4 => "tcp",
            Self::V6 => "tcp6",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::V4 => AF_INET,
            Self::V6 => AF_INET6,
        }
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

/// A sock_diag socket; it stays bound to the network namespace of the thread
/// that opened it.
#[derive(Debug)]
pub struct Socket(Dialogue<OwnedFd>);

/// What dumps ask of a netlink socket.
trait Channel {
    /// Sends a request to the kernel.
    fn send(&self, request: &[u8]) -> rustix::io::Result<()>;
    /// Waits for a datagram, or takes one that is there: EAGAIN without.
    fn receive(&self, buffer: &mut [u8], wait: bool) -> rustix::io::Result<Received>;
}

/// A datagram that was read.
struct Received {
    /// Bytes in the buffer.
    read: usize,
    /// Bytes it had, more than `read` where it was cut.
    length: usize,
    /// It came from the kernel, not from another process.
    from_kernel: bool,
}

impl Channel for OwnedFd {
    fn send(&self, request: &[u8]) -> rustix::io::Result<()> {
        rustix::net::send(self, request, SendFlags::empty()).map(drop)
    }

    fn receive(&self, buffer: &mut [u8], wait: bool) -> rustix::io::Result<Received> {
        let flags = match wait {
            true => RecvFlags::TRUNC,
            false => RecvFlags::TRUNC | RecvFlags::DONTWAIT,
        };
        let (read, length, from) = rustix::net::recvfrom(self, buffer, flags)?;
        let from_kernel = from
            .and_then(|from| SocketAddrNetlink::try_from(from).ok())
            .is_some_and(|from| from.pid() == 0);
        Ok(Received {
            read,
            length,
            from_kernel,
        })
    }
}

/// Requests over a channel, and their answers.
#[derive(Debug)]
struct Dialogue<C> {
    channel: C,
    /// Number of the last request.
    sequence: u32,
}

/// How a dump ended.
#[derive(Debug)]
pub enum Dumped {
    /// Every socket was delivered, as far as such a dump can promise.
    Complete,
    /// Cut short: some rows may be missing, some may have come twice.
    Partial(String),
    /// Nothing was delivered: the kernel does not do this dump.
    Refused(io::Error),
    /// The sink asked to stop.
    Stopped,
}

impl Socket {
    /// Opens one in the calling thread's network namespace.
    ///
    /// # Errors
    /// Whatever socket(2) gives: EPROTONOSUPPORT without CONFIG_INET_DIAG,
    /// EPERM or EACCES under seccomp or an LSM.
    pub fn open() -> io::Result<Self> {
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(netlink::SOCK_DIAG),
        )?;
        // To the kernel, which then refuses what other processes send
        // (`netlink_getsockbyportid`): who is root in a user namespace of its
        // own could keep the queue full and a dump from going on.
        rustix::net::connect(&fd, &SocketAddrNetlink::new(0, 0))?;
        // A dump is produced by the very calls that read it, so this bounds
        // nothing but a kernel that does not answer at all.
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        Ok(Self(Dialogue {
            channel: fd,
            sequence: 0,
        }))
    }

    /// Dumps both families in one walk of the kernel's table, by the older
    /// request that ss(8) sends: there a family of 0 means any, whereas two
    /// dumps of a family each walk all sockets twice.
    pub fn dump_both(
        &mut self,
        states: States,
        info: bool,
        buffer: &mut DumpBuffer,
        undecodable: &mut u64,
        sink: impl FnMut(Row) -> bool,
    ) -> Dumped {
        self.0.dump(None, states, info, buffer, undecodable, sink)
    }

    /// Dumps one family. With `info` rows carry [`Traffic`] and the kernel
    /// takes each socket's lock. A dump that the kernel breaks off is asked
    /// for once more, so rows may come twice.
    pub fn dump(
        &mut self,
        family: Family,
        states: States,
        info: bool,
        buffer: &mut DumpBuffer,
        undecodable: &mut u64,
        sink: impl FnMut(Row) -> bool,
    ) -> Dumped {
        self.0
            .dump(Some(family), states, info, buffer, undecodable, sink)
    }
}

impl<C: Channel> Dialogue<C> {
    fn dump(
        &mut self,
        family: Option<Family>,
        states: States,
        info: bool,
        buffer: &mut DumpBuffer,
        undecodable: &mut u64,
        mut sink: impl FnMut(Row) -> bool,
    ) -> Dumped {
        let delivered = Cell::new(false);
        let mut sink = |row: Row| {
            delivered.set(true);
            // The kernel's mask goes by what a minisock was before.
            !states.has(row.state) || sink(row)
        };
        let mut last = String::new();
        let (mut attempts, mut was_busy) = (ATTEMPTS, false);
        while attempts > 0 {
            attempts -= 1;
            match self.attempt(family, states, info, buffer, undecodable, &mut sink) {
                Ok(Attempt::Complete) => return Dumped::Complete,
                Ok(Attempt::Stopped) => return Dumped::Stopped,
                Ok(Attempt::Broken(why)) => last = why,
                Err(error) => last = format!("sock_diag: {error}"),
                Ok(Attempt::Refused(error)) => {
                    match error.raw_os_error() {
                        // An attempt before was not read to its end.
                        Some(libc::EBUSY) if !was_busy => {
                            (attempts, was_busy) = (attempts + 1, true);
                        }
                        Some(libc::EBUSY | libc::ENOBUFS | libc::ENOMEM) => {}
                        _ if delivered.get() => {}
                        _ => return Dumped::Refused(error),
                    }
                    last = format!("sock_diag: {error}");
                }
            }
            self.drain(buffer);
        }
        Dumped::Partial(last)
    }

    /// Reads what is left of a broken attempt. The kernel makes a dump's next
    /// part when one is read (`netlink_recvmsg`), and refuses another dump by
    /// EBUSY until that has come to its end; where it had no memory for a
    /// part, it goes on when that refusal is read.
    fn drain(&mut self, buffer: &mut DumpBuffer) {
        let mut errors = 0;
        while errors < DRAIN_ERRORS {
            match retry(|| self.channel.receive(&mut buffer.0, false)) {
                Ok(_) => {}
                Err(rustix::io::Errno::NOBUFS) => errors += 1,
                Err(_) => break,
            }
        }
    }

    fn attempt(
        &mut self,
        family: Option<Family>,
        states: States,
        info: bool,
        buffer: &mut DumpBuffer,
        undecodable: &mut u64,
        sink: &mut impl FnMut(Row) -> bool,
    ) -> io::Result<Attempt> {
        self.sequence = self.sequence.wrapping_add(1);
        let sent = match family {
            Some(family) => {
                let request = request(family, states, info, self.sequence);
                retry(|| self.channel.send(&request))
            }
            None => {
                let request = request_both(states, info, self.sequence);
                retry(|| self.channel.send(&request))
            }
        };
        if let Err(error) = sent {
            return Ok(Attempt::Broken(format!("sock_diag request: {error}")));
        }
        let (mut interrupted, mut skipped) = (false, 0);
        loop {
            let Received {
                read,
                length,
                from_kernel,
            } = match retry(|| self.channel.receive(&mut buffer.0, true)) {
                Ok(received) => received,
                Err(rustix::io::Errno::NOBUFS) => {
                    return Ok(Attempt::Broken(
                        "sock_diag: the kernel ran out of buffer space".into(),
                    ));
                }
                Err(error) => return Err(error.into()),
            };
            if !from_kernel {
                continue;
            }
            let datagram = parse_datagram(&buffer.0[..read], self.sequence, sink);
            *undecodable += datagram.undecodable;
            skipped += datagram.undecodable;
            interrupted |= datagram.interrupted;
            if datagram.stopped {
                return Ok(Attempt::Stopped);
            }
            if let Some(errno) = datagram.error {
                return Ok(Attempt::Refused(io::Error::from_raw_os_error(errno)));
            }
            if length > read {
                return Ok(Attempt::Broken(format!(
                    "sock_diag: an answer of {length} bytes was cut at {read}"
                )));
            }
            if datagram.done {
                return Ok(if interrupted {
                    Attempt::Broken("sock_diag: the dump was interrupted by a change".into())
                } else if skipped > 0 {
                    Attempt::Broken(format!("sock_diag: {skipped} messages did not parse"))
                } else {
                    Attempt::Complete
                });
            }
        }
    }
}

/// The receive buffer of dumps, for reuse: the kernel fills at most 32 KiB a
/// datagram (`netlink_dump`), more gains nothing.
#[derive(Debug)]
pub struct DumpBuffer(Box<[u8]>);

impl Default for DumpBuffer {
    fn default() -> Self {
        Self(vec![0; DUMP_BUFFER_BYTES].into())
    }
}

impl DumpBuffer {
    /// One of another size, with which a dump goes on after other sockets.
    pub fn shorter() -> Self {
        Self(vec![0; DUMP_BUFFER_BYTES * 5 / 8].into())
    }
}

enum Attempt {
    Complete,
    Stopped,
    Broken(String),
    Refused(io::Error),
}

/// The netlink message that asks for a dump of both families: a
/// `struct inet_diag_req`, whose family 0 is any.
fn request_both(states: States, info: bool, sequence: u32) -> [u8; REQUEST_BOTH_BYTES] {
    let mut bytes = message_to_kernel(TCPDIAG_GETSOCK, sequence);
    let body: &mut [u8] = &mut bytes[HEADER_BYTES..];
    body[3] = if info { 1 << (INET_DIAG_INFO - 1) } else { 0 };
    body[52..56].copy_from_slice(&states.0.to_ne_bytes());
    bytes
}

/// The head of a request, the rest zero.
fn message_to_kernel<const BYTES: usize>(kind: u16, sequence: u32) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes[0..4].copy_from_slice(&(BYTES as u32).to_ne_bytes());
    bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    bytes
}

/// The netlink message that asks for a dump of one family.
fn request(family: Family, states: States, info: bool, sequence: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = message_to_kernel(SOCK_DIAG_BY_FAMILY, sequence);
    let body: &mut [u8] = &mut bytes[HEADER_BYTES..];
    body[0] = family.number();
    body[1] = IPPROTO_TCP;
    body[2] = if info { 1 << (INET_DIAG_INFO - 1) } else { 0 };
    body[4..8].copy_from_slice(&states.0.to_ne_bytes());
    bytes
}

/// Repeats a system call that a signal interrupted.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other,
        }
    }
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

fn row(payload: &[u8]) -> Option<Message> {
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
fn traffic(row_state: u8, queued: u32, info: &[u8]) -> Option<Traffic> {
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

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn read_i32(bytes: &[u8], at: usize) -> Option<i32> {
    read_u32(bytes, at).map(u32::cast_signed)
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// NLMSG_ALIGN and NLA_ALIGN.
const fn align(length: usize) -> usize {
    (length + 3) & !3
}

const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A dump and one repetition.
const ATTEMPTS: usize = 2;
/// Failed reads, with a remainder to be thrown away, after which it is left.
const DRAIN_ERRORS: usize = 16;
const DUMP_BUFFER_BYTES: usize = 32 * 1024;

// include/uapi/linux/netlink.h, sock_diag.h and inet_diag.h.
const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = HEADER_BYTES + 56;
/// With `struct inet_diag_req`: 4 bytes, `inet_diag_sockid`, states, dbs.
const REQUEST_BOTH_BYTES: usize = HEADER_BYTES + 60;
const DIAG_MESSAGE_BYTES: usize = 72;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// The older request, and the kind of its answers.
const TCPDIAG_GETSOCK: u16 = 18;
const NLA_TYPE_MASK: u16 = 0x3fff;
const INET_DIAG_INFO: u16 = 2;
/// `idiag_timer` of a TIME_WAIT minisock (`inet_twsk_diag_fill`).
const TIMER_TIME_WAIT: u8 = 3;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;

// Offsets in `struct tcp_info`, include/uapi/linux/tcp.h.
const TCPI_UNACKED: usize = 24;
const TCPI_RTT: usize = 68;
const TCPI_TOTAL_RETRANS: usize = 100;
const TCPI_BYTES_ACKED: usize = 120;
const TCPI_BYTES_RECEIVED: usize = 128;
const TCPI_NOTSENT_BYTES: usize = 144;
const TCPI_BYTES_SENT: usize = 200;
const TCPI_BYTES_RETRANS: usize = 208;

#[cfg(test)]
mod overrun;
#[cfg(test)]
mod scripted;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INET: &[u8] = include_bytes!("../../../fixtures/diag/inet");
    const INET6: &[u8] = include_bytes!("../../../fixtures/diag/inet6");
    const INET_INFO: &[u8] = include_bytes!("../../../fixtures/diag/inet-info");
    /// What the recording asked with.
    const SEQUENCE: u32 = 7;

    /// A recording is a series of datagrams with their lengths before them.
    fn datagrams(mut recording: &[u8]) -> Vec<&[u8]> {
        let mut datagrams = Vec::new();
        while let Some((length, rest)) = recording.split_first_chunk() {
            let (datagram, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
            datagrams.push(datagram);
            recording = rest;
        }
        datagrams
    }

    fn rows(recording: &[u8]) -> Vec<Row> {
        let mut rows = Vec::new();
        let mut last = Datagram::default();
        for datagram in datagrams(recording) {
            assert!(!last.done);
            last = parse_datagram(datagram, SEQUENCE, &mut |row| {
                rows.push(row);
                true
            });
            assert_eq!((last.error, last.undecodable), (None, 0));
        }
        assert!(last.done && !last.interrupted);
        rows
    }

    fn show(row: &Row) -> String {
        let Tuple {
            local,
            local_port,
            remote,
            remote_port,
        } = row.tuple;
        format!(
            "{:02} {local} {local_port} {remote} {remote_port} {} {} {} {}",
            row.state, row.inode, row.receive_queue, row.send_queue, row.cookie
        )
    }

    fn parse_one(datagram: &[u8]) -> (Datagram, Vec<Row>) {
        let mut rows = Vec::new();
        let outcome = parse_datagram(datagram, SEQUENCE, &mut |row| {
            rows.push(row);
            true
        });
        (outcome, rows)
    }

    fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((HEADER_BYTES + payload.len()) as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(SEQUENCE.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(align(bytes.len()), 0);
        bytes
    }

    /// A diag message with an INFO attribute that holds these figures.
    fn with_info(state: u8, info: &[u8]) -> Vec<u8> {
        let mut payload = vec![0; DIAG_MESSAGE_BYTES];
        payload[0] = AF_INET;
        payload[1] = state;
        payload.extend(5_u16.to_ne_bytes()); // another attribute before it
        payload.extend(8_u16.to_ne_bytes());
        payload.extend([0; 4]);
        payload.extend(((4 + info.len()) as u16).to_ne_bytes());
        payload.extend(INET_DIAG_INFO.to_ne_bytes());
        payload.extend(info);
        payload
    }

    /// Of a socket without anything on its way.
    fn info(received: u64, acked: u64, segments: u32, rtt: u32) -> Vec<u8> {
        let (sent, again) = (acked + 10_000, 1_000_u64);
        let mut info = vec![0xaa; 248];
        info[TCPI_UNACKED..][..4].fill(0);
        info[TCPI_NOTSENT_BYTES..][..4].fill(0);
        info[TCPI_BYTES_ACKED..][..8].copy_from_slice(&acked.to_ne_bytes());
        info[TCPI_BYTES_RECEIVED..][..8].copy_from_slice(&received.to_ne_bytes());
        info[TCPI_BYTES_SENT..][..8].copy_from_slice(&sent.to_ne_bytes());
        info[TCPI_BYTES_RETRANS..][..8].copy_from_slice(&again.to_ne_bytes());
        info[TCPI_TOTAL_RETRANS..][..4].copy_from_slice(&segments.to_ne_bytes());
        info[TCPI_RTT..][..4].copy_from_slice(&rtt.to_ne_bytes());
        info
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn recorded_dumps_read_as_ss_showed_them() {
        for (recording, expected) in [
            (INET, include_str!("../../../fixtures/diag/inet.expected")),
            (INET6, include_str!("../../../fixtures/diag/inet6.expected")),
        ] {
            let shown: Vec<_> = rows(recording).iter().map(show).collect();
            assert_eq!(shown, expected.lines().collect::<Vec<_>>());
            assert!(rows(recording).iter().all(|row| row.traffic.is_none()));
        }
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn recorded_figures_are_payload_alone() {
        let rows = rows(INET_INFO);
        let figures = |port: u16, state: u8| -> Vec<_> {
            rows.iter()
                .filter(|row| row.tuple.local_port == port && row.state == state)
                .map(|row| {
                    let traffic = row.traffic.unwrap();
                    let active = state != state::CLOSE_WAIT && port != 8080;
                    (traffic.received_bytes, traffic.sent_payload(active))
                })
                .collect()
        };
        // 321 bytes were sent from port 8080, on the second of two children.
        assert_eq!(figures(8080, state::ESTABLISHED), [(0, 0), (0, 321)]);
        assert_eq!(figures(50494, state::ESTABLISHED), [(321, 0)]);
        // The kernel reads 1 here, for the peer's FIN.
        assert_eq!(figures(8081, state::CLOSE_WAIT), [(0, 0)]);
        assert_eq!(figures(57534, state::FIN_WAIT2), [(0, 0)]);
        for row in &rows {
            let opened = States::OPEN.has(row.state);
            assert_eq!(row.traffic.is_some(), opened, "{}", show(row));
        }
    }

    #[test]
    fn figures_come_from_their_offsets_and_only_when_all_are_there() {
        let full = info(1_000, 3_552, 3, 250);
        let figures = |state, info: &[u8]| match parse_message(&with_info(state, info)) {
            Message::Row(row) => row.traffic,
            other => panic!("{other:?}"),
        };
        let expected = Traffic {
            received_bytes: 1_000,
            sent_bytes: 3_552,
            retransmitted_segments: 3,
            srtt_us: 250,
        };
        // Whether the peer's FIN is among what was received, and ours among
        // what was sent.
        for (state, theirs, ours) in [
            (1, 0, 0),
            (4, 0, 1),
            (5, 0, 1),
            (8, 1, 0),
            (9, 1, 1),
            (11, 1, 1),
        ] {
            let expected = Traffic {
                received_bytes: 1_000 - theirs,
                sent_bytes: 3_552 - ours,
                ..expected
            };
            assert_eq!(figures(state, &full), Some(expected), "{state}");
        }
        for state in [2, 3, 10] {
            assert_eq!(figures(state, &full), None);
        }
        for length in 0..TCPI_BYTES_RETRANS + 8 {
            assert_eq!(figures(1, &full[..length]), None, "{length}");
        }
        assert_eq!(figures(1, &full[..TCPI_BYTES_RETRANS + 8]), Some(expected));
    }

    #[test]
    fn sent_is_what_was_acknowledged_and_what_is_on_its_way() {
        let sent = |state, queued: u32, unsent: u32, unacked: u32, transmitted: u64| {
            let mut info = info(0, 10_000, 0, 0);
            info[TCPI_NOTSENT_BYTES..][..4].copy_from_slice(&unsent.to_ne_bytes());
            info[TCPI_UNACKED..][..4].copy_from_slice(&unacked.to_ne_bytes());
            info[TCPI_BYTES_SENT..][..8].copy_from_slice(&transmitted.to_ne_bytes());
            info[TCPI_BYTES_RETRANS..][..8].fill(0);
            traffic(state, queued, &info).unwrap().sent_bytes
        };
        // A queue of ours dropped half of what was transmitted.
        assert_eq!(sent(1, 5_000, 2_000, 3, 26_000), 13_000);
        // A FIN waits behind what is not sent, or has been sent.
        assert_eq!(sent(4, 5_000, 2_000, 3, 26_000), 13_000);
        assert_eq!(sent(4, 3_001, 0, 3, 26_000), 13_000);
        // All was acknowledged after the queue was read.
        assert_eq!(sent(1, 5_000, 0, 0, 26_000), 10_000);
        // Some was, and nothing was dropped: at most that and a SYN.
        assert_eq!(sent(1, 5_000, 0, 1, 11_000), 11_001);
    }

    #[test]
    fn minisocks_closed_sockets_and_strange_states_give_no_rows() {
        let mut payload = vec![0; DIAG_MESSAGE_BYTES];
        payload[0] = AF_INET;
        for (state, timer, expected) in [
            (6, 3, Message::LeftOut),
            (5, 3, Message::LeftOut),
            (7, 0, Message::LeftOut),
            (0, 0, Message::Undecodable),
            (12, 0, Message::Undecodable),
            (13, 0, Message::Undecodable),
            (255, 0, Message::Undecodable),
        ] {
            payload[1] = state;
            payload[2] = timer;
            assert_eq!(parse_message(&payload), expected, "{state} {timer}");
        }
        payload[1] = 1;
        payload[2] = 0;
        assert!(matches!(parse_message(&payload), Message::Row(_)));
        payload[0] = 1;
        assert_eq!(parse_message(&payload), Message::Undecodable);
        assert_eq!(parse_message(&payload[..71]), Message::Undecodable);
    }

    #[test]
    fn no_cookie_is_no_cookie() {
        let mut payload = vec![0; DIAG_MESSAGE_BYTES];
        payload[..2].copy_from_slice(&[AF_INET, 1]);
        payload[44..52].fill(0xff);
        let Message::Row(row) = parse_message(&payload) else {
            panic!("not a row");
        };
        assert_eq!(row.cookie, 0);
    }

    #[test]
    fn the_end_an_error_and_an_overrun_end_a_dump() {
        let (done, _) = parse_one(&message(NLMSG_DONE, 0, &0_i32.to_ne_bytes()));
        assert_eq!(
            done,
            Datagram {
                done: true,
                ..Datagram::default()
            }
        );
        let (empty, _) = parse_one(&message(NLMSG_DONE, 0, &[]));
        assert_eq!(
            empty,
            Datagram {
                done: true,
                ..Datagram::default()
            }
        );

        let refused = message(NLMSG_ERROR, 0, &(-libc::ENOENT).to_ne_bytes());
        let (refused, _) = parse_one(&refused);
        assert_eq!((refused.done, refused.error), (true, Some(libc::ENOENT)));
        let (failed, _) = parse_one(&message(NLMSG_DONE, 0, &(-libc::ENOMEM).to_ne_bytes()));
        assert_eq!((failed.done, failed.error), (true, Some(libc::ENOMEM)));
        let (lowest, _) = parse_one(&message(NLMSG_ERROR, 0, &i32::MIN.to_ne_bytes()));
        assert_eq!(lowest.error, Some(i32::MAX));

        let (overrun, _) = parse_one(&message(NLMSG_OVERRUN, 0, &[]));
        assert_eq!((overrun.done, overrun.error), (true, Some(libc::ENOBUFS)));
    }

    #[test]
    fn an_interrupted_dump_says_so() {
        let payload = with_info(1, &[]);
        let mut bytes = message(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP_INTR, &payload);
        bytes.extend(message(SOCK_DIAG_BY_FAMILY, 0, &payload));
        let (outcome, rows) = parse_one(&bytes);
        assert!(outcome.interrupted && !outcome.done);
        assert_eq!(rows.len(), 2);
    }

    #[test]
    fn answers_to_another_request_are_ignored() {
        let payload = with_info(1, &[]);
        let mut bytes = message(SOCK_DIAG_BY_FAMILY, 0, &payload);
        bytes.extend(message(NLMSG_DONE, 0, &[0; 4]));
        let stale = parse_datagram(&bytes, SEQUENCE + 1, &mut |_| panic!("a stale row"));
        assert_eq!(stale, Datagram::default());
    }

    #[test]
    fn a_broken_message_costs_what_follows_and_is_counted() {
        let mut bytes = message(SOCK_DIAG_BY_FAMILY, 0, &with_info(1, &[]));
        bytes.extend(message(SOCK_DIAG_BY_FAMILY, 0, &[1, 2, 3])); // short: skipped
        bytes.extend(message(77, 0, &[])); // unknown kind: skipped
        bytes.extend(message(SOCK_DIAG_BY_FAMILY, 0, &with_info(2, &[])));
        bytes.extend([9, 0, 0, 0, 20]); // no header: the end
        let (outcome, rows) = parse_one(&bytes);
        assert_eq!(rows.len(), 2);
        assert_eq!(
            outcome,
            Datagram {
                undecodable: 3,
                ..Datagram::default()
            }
        );
    }

    #[test]
    fn the_request_is_what_the_kernel_reads() {
        let states = States::LISTEN.and(States::OPENING).and(States::OPEN);
        let request = request(Family::V6, states, true, 9);
        assert_eq!(request.len(), 72);
        assert_eq!(request[..4], 72_u32.to_ne_bytes());
        assert_eq!(request[16..20], [10, 6, 2, 0]);
        // 1 to 5 and 8 to 11; neither TIME_WAIT, CLOSE, NEW_SYN_RECV nor
        // BOUND_INACTIVE.
        assert_eq!(request[20..24], 0b1111_0011_1110_u32.to_ne_bytes());
        assert!(request[24..].iter().all(|&byte| byte == 0));
        for state in [0, 6, 7, 12, 13, 31, 32, 255] {
            assert!(!states.has(state), "{state}");
        }
        // struct inet_diag_req: family, prefixes, extensions, 48 bytes, states.
        let both = request_both(states, true, 9);
        assert_eq!(
            (both.len(), both[..6].to_vec()),
            (76, vec![76, 0, 0, 0, 18, 0])
        );
        assert_eq!(both[16..20], [0, 0, 0, 2]);
        assert_eq!(both[68..72], 0b1111_0011_1110_u32.to_ne_bytes());
        assert!(
            both[20..68]
                .iter()
                .chain(&both[72..])
                .all(|&byte| byte == 0)
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = parse_one(&bytes);
            let _ = parse_message(&bytes);
        }

        #[test]
        fn recordings_survive_cuts_and_flips(
            cut in 0_usize..6_000,
            flips in proptest::collection::vec((0_usize..6_000, any::<u8>()), 0..8),
        ) {
            for recording in [INET, INET6, INET_INFO] {
                let mut datagram = datagrams(recording)[0].to_vec();
                let whole = parse_one(&datagram).1.len();
                for &(at, byte) in &flips {
                    if let Some(place) = datagram.get_mut(at) {
                        *place = byte;
                    }
                }
                datagram.truncate(cut);
                // A flipped length can make rows of attributes, never more
                // than the bytes could hold.
                let (_, rows) = parse_one(&datagram);
                prop_assert!(rows.len() <= datagram.len() / (HEADER_BYTES + DIAG_MESSAGE_BYTES));
                if flips.is_empty() {
                    prop_assert!(rows.len() <= whole);
                }
            }
        }
    }
}
