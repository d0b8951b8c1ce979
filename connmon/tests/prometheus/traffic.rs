//! TCP connections inside a namespace of the test's own.

use std::fs::File;
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, SockRef, Socket, Type};

/// A network namespace in which all of 10.0.0.0/8 is local.
pub struct Network {
    name: String,
}

/// Connections held open, both ends.
pub struct Held {
    port: u16,
    _listener: TcpListener,
    _ends: Vec<(TcpStream, TcpStream)>,
}

impl Held {
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Network {
    pub fn new(_: &super::fixture::Requirements) -> Self {
        let name = format!("metrics-connmon-{}", std::process::id());
        ip(&["netns", "add", &name]);
        let network = Self { name };
        ip(&["-n", &network.name, "link", "set", "lo", "up"]);
        ip(&[
            "-n",
            &network.name,
            "address",
            "add",
            "10.0.0.1/8",
            "dev",
            "lo",
        ]);
        network
    }

    /// Opens `count` connections and holds them.
    pub fn hold(&self, server: &str, client: &str, count: usize) -> Held {
        self.inside(|| {
            let listener = listen(server, 0);
            let address = listener.local_addr().unwrap();
            let ends = (0..count)
                .map(|_| pair(&listener, address, client))
                .collect();
            Held {
                port: address.port(),
                _listener: listener,
                _ends: ends,
            }
        })
    }

    /// Opens and closes one connection after the other, `pace` apart.
    pub fn open_and_close(&self, server: &str, client: &str, count: u32, pace: Duration) {
        self.inside(|| {
            let listener = listen(server, 0);
            let address = listener.local_addr().unwrap();
            let start = Instant::now();
            for index in 0..count {
                let due = start + pace * index;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                reset(pair(&listener, address, client));
            }
        });
    }

    /// Opens and closes one connection to every port of the server, each from
    /// the address that `client` gives for it; returns how many there were.
    /// Ports are listened on in batches, and those that are taken left out.
    pub fn scan(&self, server: &str, batch: u16, client: impl Fn(u16) -> String + Sync) -> u32 {
        self.inside(|| {
            let mut scanned = 0;
            let ports: Vec<u16> = (1..=u16::MAX).collect();
            for ports in ports.chunks(batch.into()) {
                let listeners: Vec<TcpListener> = ports
                    .iter()
                    .filter_map(|port| try_listen(server, *port).ok())
                    .collect();
                for listener in &listeners {
                    let address = listener.local_addr().unwrap();
                    reset(pair(listener, address, &client(address.port())));
                    scanned += 1;
                }
            }
            scanned
        })
    }

    /// Runs in a thread that has entered the namespace.
    fn inside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        let netns = File::open(format!("/run/netns/{}", self.name)).unwrap();
        std::thread::scope(|scope| {
            scope
                .spawn(move || {
                    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
                        .unwrap();
                    run()
                })
                .join()
                .unwrap()
        })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .status();
    }
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {arguments:?}: {status}");
}

fn listen(address: &str, port: u16) -> TcpListener {
    try_listen(address, port).unwrap()
}

fn try_listen(address: &str, port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind(SocketAddrV4::new(address.parse().unwrap(), port))
}

/// One connection from an address, as (client, server) ends.
fn pair(listener: &TcpListener, server: SocketAddr, client: &str) -> (TcpStream, TcpStream) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let from = SocketAddrV4::new(client.parse().unwrap(), 0);
    socket.bind(&SocketAddr::from(from).into()).unwrap();
    socket.connect(&server.into()).unwrap();
    (socket.into(), listener.accept().unwrap().0)
}

/// Closes both ends without leaving a TIME_WAIT behind.
fn reset((client, server): (TcpStream, TcpStream)) {
    SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    drop(server);
}
