//! Dumps of the kernel's TCP sockets over NETLINK_SOCK_DIAG: asks, reads the
//! answers, and asks once more where the kernel broke a dump off. The bytes of
//! both are in `diag/message.rs`. Minimum kernel: 4.19 for traffic counters.

mod message;

pub use message::{Datagram, States, parse_datagram, parse_message};

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use connmon_core::scan::Row;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

/// A sock_diag socket; it stays bound to the network namespace of the thread
/// that opened it.
#[derive(Debug)]
pub struct Socket<C = OwnedFd> {
    channel: C,
    /// Number of the last request.
    sequence: u32,
}

/// What a dump asks of a netlink socket; in tests a script answers.
pub trait Channel {
    /// Sends a request to the kernel.
    ///
    /// # Errors
    /// Those of send(2).
    fn send(&self, request: &[u8]) -> rustix::io::Result<()>;

    /// Takes a datagram, and waits for one if `wait` is set.
    ///
    /// # Errors
    /// Those of recvfrom(2): EAGAIN where none is there.
    fn receive(&self, buffer: &mut [u8], wait: bool) -> rustix::io::Result<Received>;
}

/// A datagram that was read.
#[derive(Debug)]
pub struct Received {
    /// Bytes in the buffer.
    pub read: usize,
    /// Bytes that it had, more than `read` where it was cut.
    pub length: usize,
    /// It came from the kernel, not from another process.
    pub from_kernel: bool,
}

impl Channel for OwnedFd {
    fn send(&self, request: &[u8]) -> rustix::io::Result<()> {
        rustix::net::send(self, request, SendFlags::empty()).map(drop)
    }

    fn receive(&self, buffer: &mut [u8], wait: bool) -> rustix::io::Result<Received> {
        let mut flags = RecvFlags::TRUNC;
        flags.set(RecvFlags::DONTWAIT, !wait);
        let (read, length, from) = rustix::net::recvfrom(self, buffer, flags)?;
        let from = from.and_then(|from| SocketAddrNetlink::try_from(from).ok());
        Ok(Received {
            read,
            length,
            from_kernel: from.is_some_and(|from| from.pid() == 0),
        })
    }
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
    /// Those of socket(2): EPROTONOSUPPORT without CONFIG_INET_DIAG, EPERM or
    /// EACCES under seccomp or an LSM.
    pub fn open() -> io::Result<Self> {
        let channel = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(netlink::SOCK_DIAG),
        )?;
        // Connected, so that the kernel refuses what other processes send
        // (`netlink_getsockbyportid`): root of a user namespace could fill the
        // queue and hold up a dump.
        rustix::net::connect(&channel, &SocketAddrNetlink::new(0, 0))?;
        // The kernel makes a dump within the calls that read it, so this ends
        // only the wait for a kernel that does not answer.
        sockopt::set_socket_timeout(&channel, sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        Ok(Self {
            channel,
            sequence: 0,
        })
    }
}

impl<C: Channel> Socket<C> {
    /// Dumps the IPv4 and IPv6 sockets that are in one of `states`. With
    /// `traffic` rows carry [`connmon_core::event::Traffic`], and the kernel
    /// takes each socket's lock. `sink` gets each row and returns whether to
    /// go on. A dump that the kernel breaks off is asked for once more, so
    /// rows may come twice. Messages that do not parse are added to
    /// `undecodable`.
    pub fn dump(
        &mut self,
        states: States,
        traffic: bool,
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
        let (mut attempts, mut was_busy) = (ATTEMPTS, false);
        loop {
            attempts -= 1;
            let why = match self.attempt(states, traffic, buffer, undecodable, &mut sink) {
                Dumped::Partial(why) => why,
                Dumped::Refused(error) => {
                    match error.raw_os_error() {
                        // An attempt before was not read to its end.
                        Some(libc::EBUSY) if !was_busy => {
                            (attempts, was_busy) = (attempts + 1, true);
                        }
                        Some(libc::EBUSY | libc::ENOBUFS | libc::ENOMEM) => {}
                        _ if delivered.get() => {}
                        _ => return Dumped::Refused(error),
                    }
                    format!("sock_diag: {error}")
                }
                ended => return ended,
            };
            self.drain(buffer);
            if attempts == 0 {
                return Dumped::Partial(why);
            }
        }
    }

    /// Reads what is left of a broken attempt. The kernel makes the next part
    /// of a dump when one is read (`netlink_recvmsg`), and answers another
    /// request with EBUSY until the dump has ended. Where it had no memory for
    /// a part, it goes on when that error is read.
    fn drain(&mut self, buffer: &mut DumpBuffer) {
        let mut errors = 0;
        while errors < DRAIN_ERRORS {
            match retry_on_intr(|| self.channel.receive(&mut buffer.0, false)) {
                Ok(_) => {}
                Err(Errno::NOBUFS) => errors += 1,
                Err(_) => break,
            }
        }
    }

    fn attempt(
        &mut self,
        states: States,
        traffic: bool,
        buffer: &mut DumpBuffer,
        undecodable: &mut u64,
        sink: &mut impl FnMut(Row) -> bool,
    ) -> Dumped {
        self.sequence = self.sequence.wrapping_add(1);
        let request = message::request(states, traffic, self.sequence);
        if let Err(error) = retry_on_intr(|| self.channel.send(&request)) {
            return Dumped::Partial(format!("sock_diag request: {error}"));
        }
        let (mut interrupted, mut skipped) = (false, 0);
        loop {
            let received = match retry_on_intr(|| self.channel.receive(&mut buffer.0, true)) {
                Ok(received) => received,
                Err(Errno::NOBUFS) => {
                    return Dumped::Partial("sock_diag: the kernel ran out of buffer space".into());
                }
                Err(error) => return Dumped::Partial(format!("sock_diag: {error}")),
            };
            if !received.from_kernel {
                continue;
            }
            let answers = &buffer.0[..received.read];
            let datagram = parse_datagram(answers, self.sequence, sink);
            *undecodable += datagram.undecodable;
            skipped += datagram.undecodable;
            interrupted |= datagram.interrupted;
            if datagram.stopped {
                return Dumped::Stopped;
            }
            if let Some(errno) = datagram.error {
                return Dumped::Refused(io::Error::from_raw_os_error(errno));
            }
            if received.length > received.read {
                return Dumped::Partial(format!(
                    "sock_diag: an answer of {} bytes was cut at {}",
                    received.length, received.read
                ));
            }
            if !datagram.done {
                continue;
            }
            return if interrupted {
                Dumped::Partial("sock_diag: the dump was interrupted by a change".into())
            } else if skipped > 0 {
                Dumped::Partial(format!("sock_diag: {skipped} messages did not parse"))
            } else {
                Dumped::Complete
            };
        }
    }
}

/// The receive buffer of dumps: the kernel fills at most 32 KiB a datagram
/// (`netlink_dump`).
#[derive(Debug)]
pub struct DumpBuffer(Box<[u8]>);

impl Default for DumpBuffer {
    fn default() -> Self {
        Self(vec![0; DUMP_BUFFER_BYTES].into())
    }
}

impl DumpBuffer {
    /// A shorter one: the parts of its dumps end at other sockets.
    pub fn shorter() -> Self {
        Self(vec![0; DUMP_BUFFER_BYTES * 5 / 8].into())
    }
}

const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A dump and one repetition.
const ATTEMPTS: usize = 2;
/// Most failed reads while the rest of a broken dump is read.
const DRAIN_ERRORS: usize = 16;
const DUMP_BUFFER_BYTES: usize = 32 * 1024;

#[cfg(test)]
mod tests;
