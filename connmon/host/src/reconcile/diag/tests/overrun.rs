//! Dumps by the running kernel on a socket that has overrun, or that other
//! processes try to fill.

use std::net::{Ipv4Addr, TcpListener, TcpStream};

use super::super::message::*;
use super::super::*;

/// A request that the kernel answers by an error alone.
const NO_SUCH_REQUEST: u16 = 0x7f;

/// Has the kernel answer more than fits into the socket: the one way to ENOBUFS
/// without exhausting memory (`netlink_overrun`). A dump that begins then stops
/// at its first part (`netlink_dump`).
fn overrun(socket: &Socket) {
    let fd = &socket.channel;
    // The kernel's minimum.
    sockopt::set_socket_recv_buffer_size(fd, 1).unwrap();
    for _ in 0..64 {
        let mut request = request(States::LISTEN, false, 0);
        request[4..6].copy_from_slice(&NO_SUCH_REQUEST.to_ne_bytes());
        fd.send(&request).unwrap();
    }
}

#[test]
fn a_dump_after_an_overrun_is_complete() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let client = TcpStream::connect(address).unwrap();
    let (server, _) = listener.accept().unwrap();
    let mut socket = Socket::open().unwrap();
    for overruns in [false, true, false] {
        if overruns {
            overrun(&socket);
        }
        let mut sockets = 0;
        let dumped = socket.dump(
            States::OPEN,
            false,
            &mut DumpBuffer::default(),
            &mut 0,
            |row| {
                sockets += u32::from(row.tuple.local_port == address.port());
                true
            },
        );
        assert!(matches!(dumped, Dumped::Complete), "{dumped:?}");
        // A broken dump's rows may come twice.
        assert!(
            (1..=1 + u32::from(overruns)).contains(&sockets),
            "{sockets}"
        );
    }
    drop((client, server));
}

#[test]
fn an_overrun_gives_enobufs() {
    let socket = Socket::open().unwrap();
    overrun(&socket);
    let received = socket.channel.receive(&mut [0; 64], false);
    assert_eq!(received.err(), Some(rustix::io::Errno::NOBUFS));
}

#[test]
fn other_processes_cannot_send_to_it() {
    let socket = Socket::open().unwrap();
    let address = rustix::net::getsockname(&socket.channel).unwrap();
    let other = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )
    .unwrap();
    let sent = rustix::net::sendto(&other, &[0; 64], SendFlags::empty(), &address);
    // EPERM without CAP_NET_ADMIN, whatever the socket is like.
    let refused = [rustix::io::Errno::CONNREFUSED, rustix::io::Errno::PERM];
    assert!(refused.contains(&sent.unwrap_err()), "{sent:?}");
    let received = socket.channel.receive(&mut [0; 64], false);
    assert_eq!(received.err(), Some(rustix::io::Errno::AGAIN));
}
