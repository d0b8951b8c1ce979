//! Loopback connections of every kind a test wants.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use socket2::{Domain, Socket, Type};

/// How a pair talks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
    /// An IPv4 client of a dual-stack IPv6 listener.
    Mapped,
}

impl Family {
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    fn listen_address(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::LOCALHOST.into(),
            Self::V6 => Ipv6Addr::LOCALHOST.into(),
            Self::Mapped => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    fn connect_address(self) -> IpAddr {
        match self {
            Self::V4 | Self::Mapped => Ipv4Addr::LOCALHOST.into(),
            Self::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }
}

/// A listener and how to reach it.
pub struct Server {
    pub listener: TcpListener,
    pub address: SocketAddr,
}

impl Server {
    pub fn new(family: Family) -> Self {
        Self::with_backlog(family, 4096)
    }

    pub fn with_backlog(family: Family, backlog: i32) -> Self {
        let bind = SocketAddr::new(family.listen_address(), 0);
        let socket = Socket::new(Domain::for_address(bind), Type::STREAM, None).unwrap();
        if bind.is_ipv6() {
            socket.set_only_v6(family == Family::V6).unwrap();
        }
        socket.bind(&bind.into()).unwrap();
        socket.listen(backlog).unwrap();
        let listener = TcpListener::from(socket);
        let port = listener.local_addr().unwrap().port();
        Self {
            listener,
            address: SocketAddr::new(family.connect_address(), port),
        }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    pub fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).unwrap()
    }

    /// A connection, client and server end.
    pub fn pair(&self) -> Pair {
        let client = self.connect();
        let (server, _) = self.listener.accept().unwrap();
        Pair { client, server }
    }

    pub fn pairs(&self, count: usize) -> Vec<Pair> {
        (0..count).map(|_| self.pair()).collect()
    }
}

/// Both ends of a connection.
pub struct Pair {
    pub client: TcpStream,
    pub server: TcpStream,
}

impl Pair {
    /// Moves payload both ways and reads all of it.
    pub fn exchange(&mut self, up: usize, down: usize) {
        move_bytes(&mut self.client, &mut self.server, up);
        move_bytes(&mut self.server, &mut self.client, down);
    }

    /// FIN from the client first, both ends read to the end.
    pub fn close(self) {
        let Self {
            mut client,
            mut server,
        } = self;
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(server.read(&mut [0; 16]).unwrap(), 0);
        drop(server);
        assert_eq!(client.read(&mut [0; 16]).unwrap(), 0);
    }

    /// Every way to close, one after the other.
    pub fn close_in_turn(self, round: usize) {
        match round % 4 {
            0 => self.close(),
            1 => self.reset(),
            2 => {
                drop(self.server);
                drop(self.client);
            }
            _ => {
                drop(self.client);
                drop(self.server);
            }
        }
    }

    /// RST from the client.
    pub fn reset(self) {
        let client = Socket::from(self.client);
        client.set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(client);
        let mut server = self.server;
        // Seen by the server as an error once the RST is there.
        let _ = server.read(&mut [0; 16]);
    }
}

fn move_bytes(from: &mut TcpStream, to: &mut TcpStream, count: usize) {
    const CHUNK: usize = 16 * 1024;
    let chunk = [7; CHUNK];
    let mut buffer = [0; CHUNK];
    let mut left = count;
    while left > 0 {
        let now = left.min(CHUNK);
        from.write_all(&chunk[..now]).unwrap();
        to.read_exact(&mut buffer[..now]).unwrap();
        left -= now;
    }
}

/// A port that nobody listens on: bound, so that nobody else gets it.
pub struct ClosedPort {
    _bound: Socket,
    address: SocketAddr,
}

impl ClosedPort {
    pub fn new(family: Family) -> Self {
        let bind = SocketAddr::new(family.connect_address(), 0);
        let bound = Socket::new(Domain::for_address(bind), Type::STREAM, None).unwrap();
        bound.bind(&bind.into()).unwrap();
        let mut address = bound.local_addr().unwrap().as_socket().unwrap();
        if let (Family::Mapped, IpAddr::V4(ip)) = (family, address.ip()) {
            address.set_ip(ip.to_ipv6_mapped().into());
        }
        Self {
            _bound: bound,
            address,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A connect that is refused; by an IPv6 socket if the family is mapped.
    pub fn refused(&self) {
        let error = TcpStream::connect(self.address).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    }
}

/// What `ss` counts in a state with this local or remote port.
pub fn ss(state: &str, side: &str, port: u16) -> usize {
    ss_states(&[state], side, port)
}

/// What `ss` counts with this local or remote port between handshake and
/// CLOSE; TIME_WAIT is past it.
pub fn ss_open(side: &str, port: u16) -> usize {
    let states = [
        "established",
        "fin-wait-1",
        "fin-wait-2",
        "close-wait",
        "last-ack",
        "closing",
    ];
    ss_states(&states, side, port)
}

fn ss_states(states: &[&str], side: &str, port: u16) -> usize {
    let states = states.iter().flat_map(|state| ["state", state]);
    // TIME_WAIT counts as FIN_WAIT2 in a dump; its timer tells it apart.
    let output = Command::new("ss")
        .arg("-Hton")
        .args(states)
        .arg(format!("{side} = :{port}"))
        .output()
        .expect("ss (iproute2) runs");
    assert!(output.status.success());
    let lines = String::from_utf8(output.stdout).unwrap();
    lines
        .lines()
        .filter(|line| !line.contains("timer:(timewait"))
        .count()
}
