//! NETLINK_SOCK_DIAG dumps: the socket that asks for them. Its messages are in
//! `diag/message.rs`.
//!
//! Parsing is a total function over bytes. The request is
//! `struct inet_diag_req_v2`, the answers `struct inet_diag_msg` and
//! `struct tcp_info` (include/uapi/linux/inet_diag.h and tcp.h), all of which
//! only ever grow at the end. Minimum kernel: 4.19 for the traffic figures.

mod message;

pub use message::{Datagram, Message, parse_datagram, parse_message};

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use connmon_common::state;
use connmon_core::scan::Row;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

use message::{AF_INET, AF_INET6, request, request_both};

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

    /// Dumps one family. With `info` rows carry [`connmon_core::event::Traffic`] and the kernel
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

/// Repeats a system call that a signal interrupted.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other,
        }
    }
}

const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A dump and one repetition.
const ATTEMPTS: usize = 2;
/// Failed reads, with a remainder to be thrown away, after which it is left.
const DRAIN_ERRORS: usize = 16;
const DUMP_BUFFER_BYTES: usize = 32 * 1024;

#[cfg(test)]
mod overrun;
#[cfg(test)]
mod scripted;

#[cfg(test)]
mod tests;
