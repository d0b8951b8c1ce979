//! What neither std nor socket2 offers.

use std::io;
use std::mem::size_of_val;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd};

use io_uring::{opcode, types};
use socket2::{Domain, SockAddr, Socket, Type};

/// `TCP_SYNCNT`: SYNs retransmitted before a connect times out.
pub const TCP_SYNCNT: i32 = libc::TCP_SYNCNT;
/// `TCP_FASTOPEN`: the listener's queue of Fast Open children.
pub const TCP_FASTOPEN: i32 = libc::TCP_FASTOPEN;
/// `TCP_FASTOPEN_CONNECT`: connect() is put off until the first write.
pub const TCP_FASTOPEN_CONNECT: i32 = libc::TCP_FASTOPEN_CONNECT;

/// Sets an integer option of TCP.
pub fn set_tcp(socket: &impl AsRawFd, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: the descriptor is borrowed from its owner, and the pointer and
    // length describe `value`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What is used of `struct tcp_info`.
pub struct TcpInfo {
    /// State of the socket.
    pub state: u8,
    /// Smoothed round-trip time.
    pub rtt_us: u32,
    /// Retransmitted segments in total.
    pub total_retrans: u32,
    /// Payload bytes of first transmissions; those that our own queue or a
    /// filter dropped are transmitted anew.
    pub first_sent_bytes: u64,
}

/// `TCP_INFO`.
pub fn tcp_info(socket: &impl AsRawFd) -> io::Result<TcpInfo> {
    // Eight bytes, then words (include/uapi/linux/tcp.h).
    const RTT: usize = 17;
    const TOTAL_RETRANS: usize = 25;
    const BYTES_SENT: usize = 50;
    const BYTES_RETRANS: usize = 52;
    let mut info = [0u32; BYTES_RETRANS + 2];
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the descriptor is borrowed from its owner, and the kernel writes
    // at most `length` bytes to `info`, which outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    assert_eq!(length as usize, size_of_val(&info));
    let wide = |at: usize| u64::from(info[at]) | u64::from(info[at + 1]) << 32;
    Ok(TcpInfo {
        state: info[0].to_ne_bytes()[0],
        rtt_us: info[RTT],
        total_retrans: info[TOTAL_RETRANS],
        first_sent_bytes: wide(BYTES_SENT) - wide(BYTES_RETRANS),
    })
}

/// A connection of this host without its socket: what `TCP_REPAIR` takes out
/// of one and puts into another.
pub struct Dumped {
    local: SocketAddr,
    remote: SocketAddr,
    /// Next sequence number to receive, and to send.
    sequences: [i32; 2],
}

/// `TCP_RECV_QUEUE` and `TCP_SEND_QUEUE` of include/uapi/linux/tcp.h.
const QUEUES: [i32; 2] = [1, 2];

impl Dumped {
    /// Closes a socket of which the peer learns nothing.
    pub fn take(stream: TcpStream) -> io::Result<Self> {
        set_tcp(&stream, libc::TCP_REPAIR, 1)?;
        let mut sequences = [0; 2];
        for (queue, sequence) in QUEUES.into_iter().zip(&mut sequences) {
            set_tcp(&stream, libc::TCP_REPAIR_QUEUE, queue)?;
            *sequence = get_tcp(&stream, libc::TCP_QUEUE_SEQ)?;
        }
        Ok(Self {
            local: stream.local_addr()?,
            remote: stream.peer_addr()?,
            sequences,
        })
    }

    /// The same connection on another socket, in repair until
    /// [`end_repair`].
    pub fn restore(&self) -> io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(self.local), Type::STREAM, None)?;
        set_tcp(&socket, libc::TCP_REPAIR, 1)?;
        for (queue, sequence) in QUEUES.into_iter().zip(self.sequences) {
            set_tcp(&socket, libc::TCP_REPAIR_QUEUE, queue)?;
            set_tcp(&socket, libc::TCP_QUEUE_SEQ, sequence)?;
        }
        socket.bind(&self.local.into())?;
        socket.connect(&self.remote.into())?;
        Ok(socket.into())
    }
}

/// From here on a restored connection is one like others.
pub fn end_repair(stream: &TcpStream) -> io::Result<()> {
    set_tcp(stream, libc::TCP_REPAIR, 0)
}

fn get_tcp(socket: &impl AsRawFd, option: i32) -> io::Result<i32> {
    let mut value = 0i32;
    let mut length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the descriptor is borrowed from its owner, and the kernel writes
    // at most `length` bytes to `value`, which outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Ends the calling thread alone, the first one of a process too.
pub fn end_thread() -> ! {
    // SAFETY: no pointers; nothing of this thread's is used any more.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("a thread that ended");
}

/// connect() to AF_UNSPEC: dissolves the association.
pub fn disconnect(socket: &impl AsRawFd) -> io::Result<()> {
    let nowhere = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    // SAFETY: the descriptor is borrowed from its owner, and the pointer and
    // length describe `nowhere`, which outlives the call.
    let result = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            &raw const nowhere,
            size_of_val(&nowhere) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A stream socket of a protocol other than TCP, or why there is none.
pub fn stream(protocol: i32) -> io::Result<socket2::Socket> {
    // SAFETY: no pointers; the descriptor, if any, is owned by nobody yet.
    let fd = unsafe {
        let fd = libc::socket(
            libc::AF_INET,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
            protocol,
        );
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    Ok(fd.into())
}

/// io_uring, 5.6 for connect and accept.
pub struct Uring(io_uring::IoUring);

impl Uring {
    /// ENOSYS, or EPERM where it is switched off.
    pub fn new() -> io::Result<Self> {
        io_uring::IoUring::new(2).map(Self)
    }

    /// Connects to a listener and accepts that; client and server end.
    pub fn connect(
        &mut self,
        listener: &TcpListener,
        address: SocketAddr,
    ) -> io::Result<(TcpStream, TcpStream)> {
        const CONNECT: u64 = 1;
        let client = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        let address = SockAddr::from(address);
        let connect = opcode::Connect::new(
            types::Fd(client.as_raw_fd()),
            address.as_ptr().cast(),
            address.len(),
        );
        let accept = opcode::Accept::new(
            types::Fd(listener.as_raw_fd()),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        );
        for entry in [connect.build().user_data(CONNECT), accept.build()] {
            // SAFETY: descriptors and address outlive the operations, which
            // are waited for below.
            unsafe { self.0.submission().push(&entry) }.map_err(io::Error::other)?;
        }
        self.0.submit_and_wait(2)?;
        let mut accepted = Err(io::Error::other("accept never completed"));
        for done in self.0.completion() {
            if done.result() < 0 {
                return Err(io::Error::from_raw_os_error(-done.result()));
            }
            if done.user_data() != CONNECT {
                // SAFETY: the kernel just made this descriptor for us alone.
                accepted = Ok(unsafe { TcpStream::from_raw_fd(done.result()) });
            }
        }
        Ok((client.into(), accepted?))
    }
}
