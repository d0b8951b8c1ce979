//! Two network namespaces: `here` has one address, `there` has one in each of
//! several countries of a test database.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use mmdb_writer::{Value, Writer};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use crate::namespaces::{Namespace, ip};

/// Third byte of an address there, and the country it lies in.
pub const COUNTRIES: [(u8, &str); 5] = [(1, "DE"), (2, "US"), (3, "JP"), (4, "BR"), (5, "MT")];

/// Payload of one exchange, each way.
const PAYLOAD: usize = 1_000;

/// Both namespaces, echo servers on either side, and the database. Agents
/// watch every namespace, so that worlds at the same time have different
/// networks: what one database places is unknown to the other.
pub struct World {
    network: Network,
    // Servers first: they hold sockets of the namespaces.
    servers: Vec<Background>,
    here: Namespace,
    there: Namespace,
    directory: TempDir,
}

impl World {
    /// Needs root and iproute2. Here listens on ports 22 and 80, there on
    /// 443 and 5432.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = std::process::id() * 2 + COUNT.fetch_add(1, Ordering::Relaxed);
        let network = Network(16 + (count % 200) as u8);
        let (here, there) = (Namespace::new(), Namespace::new());
        ip(&[
            "-n",
            &here.name,
            "link",
            "add",
            "cnm0",
            "type",
            "veth",
            "peer",
            "name",
            "cnm0",
            "netns",
            &there.name,
        ]);
        let address = format!("{}/16", network.here());
        ip(&["-n", &here.name, "addr", "add", &address, "dev", "cnm0"]);
        for (third, _) in COUNTRIES {
            let address = format!("{}/16", network.abroad(third));
            ip(&["-n", &there.name, "addr", "add", &address, "dev", "cnm0"]);
        }
        for namespace in [&here, &there] {
            ip(&["-n", &namespace.name, "link", "set", "cnm0", "up"]);
        }
        let directory = TempDir::with_prefix("connmon-world-").unwrap();
        std::fs::write(directory.path().join("countries.mmdb"), database(network)).unwrap();
        let servers = [(&here, 22), (&here, 80), (&there, 443), (&there, 5432)]
            .map(|(namespace, port)| echo(namespace, port))
            .into();
        Self {
            network,
            servers,
            here,
            there,
            directory,
        }
    }

    /// For `--geoip.database`.
    pub fn database(&self) -> PathBuf {
        self.directory.path().join("countries.mmdb")
    }

    /// Connections from a country to a port here, held.
    pub fn inbound(&self, country: &str, port: u16, count: usize) -> Vec<TcpStream> {
        let from = self.network.abroad(third(country));
        let to = SocketAddr::from((self.network.here(), port));
        self.there
            .run(|| (0..count).map(|_| connect(from, to)).collect())
    }

    /// Connections from here to a port in a country, held.
    pub fn outbound(&self, country: &str, port: u16, count: usize) -> Vec<TcpStream> {
        let from = self.network.here();
        let to = SocketAddr::from((self.network.abroad(third(country)), port));
        self.here
            .run(|| (0..count).map(|_| connect(from, to)).collect())
    }

    /// A listener there, on a port that no server has.
    pub fn listen(&self, port: u16) -> TcpListener {
        self.there
            .run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap())
    }

    /// Connects from here to a port of a country that nobody listens on.
    pub fn refused(&self, country: &str, port: u16) {
        let to = SocketAddr::from((self.network.abroad(third(country)), port));
        let refused = self.here.run(|| TcpStream::connect(to));
        assert!(refused.is_err(), "somebody listens on {to}");
    }

    /// Short connections of every kind, failing ones included, until dropped.
    pub fn bustle(&self) -> Vec<Background> {
        let network = self.network;
        let inbound = Background::start(&self.there, move || {
            for (third, _) in COUNTRIES {
                for port in [22, 80] {
                    let to = SocketAddr::from((network.here(), port));
                    exchange(connect(network.abroad(third), to));
                }
            }
            sleep(Duration::from_millis(100));
        });
        let outbound = Background::start(&self.here, move || {
            for (third, _) in COUNTRIES {
                for port in [443, 5432] {
                    let to = SocketAddr::from((network.abroad(third), port));
                    exchange(connect(network.here(), to));
                }
                // Nobody listens there.
                let closed = SocketAddr::from((network.abroad(third), 81));
                assert!(TcpStream::connect(closed).is_err());
            }
            sleep(Duration::from_millis(100));
        });
        vec![inbound, outbound]
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.servers.clear();
    }
}

/// A thread inside a namespace that does one thing over and over.
pub struct Background {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    fn start(namespace: &Namespace, mut step: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        // A thread is born into the namespace of its parent.
        let thread = namespace.run(|| {
            std::thread::spawn(move || {
                while !asked.load(Ordering::Relaxed) {
                    step();
                }
            })
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "it panicked");
        }
    }
}

fn third(country: &str) -> u8 {
    let of = |(_, code): &&(u8, &str)| *code == country;
    COUNTRIES.iter().find(of).expect("a country of COUNTRIES").0
}

/// 10.x.0.0/16: here is 10.x.0.1, a country lies in 10.x.y.0/24.
#[derive(Clone, Copy)]
struct Network(u8);

impl Network {
    fn here(self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.0, 0, 1)
    }

    fn abroad(self, third: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, self.0, third, 2)
    }
}

fn database(Network(second): Network) -> Vec<u8> {
    let mut writer = Writer::new("connmon-test");
    for (third, country) in COUNTRIES {
        let network: ipnet::IpNet = format!("10.{second}.{third}.0/24").parse().unwrap();
        let record = Value::map([("country_code", Value::from(country))]);
        writer.insert_value(network, record).unwrap();
    }
    writer.to_bytes().unwrap()
}

fn echo(namespace: &Namespace, port: u16) -> Background {
    let listener = namespace.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
    listener.set_nonblocking(true).unwrap();
    Background::start(namespace, move || match listener.accept() {
        Ok((stream, _)) => {
            stream.set_nonblocking(false).unwrap();
            std::thread::spawn(move || answer(stream));
        }
        Err(_) => sleep(Duration::from_millis(2)),
    })
}

/// Sends everything back until the peer is done.
fn answer(mut stream: TcpStream) {
    let mut buffer = [0; PAYLOAD];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

fn connect(from: Ipv4Addr, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

fn exchange(mut stream: TcpStream) {
    stream.write_all(&[7; PAYLOAD]).unwrap();
    stream.read_exact(&mut [0; PAYLOAD]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
}
