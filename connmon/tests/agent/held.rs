//! Connections in a network namespace of their own, held by a process there.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::namespaces::Namespace;

/// A namespace of its own with a process that holds connections in it.
pub struct Held {
    child: Child,
    namespace: Option<Namespace>,
}

impl Held {
    pub fn start(port: u16, connections: u32) -> Self {
        let namespace = Namespace::new();
        let child = holder(&namespace, Ipv4Addr::LOCALHOST, port, connections);
        Self {
            child,
            namespace: Some(namespace),
        }
    }

    /// Many connections to one port in a namespace of the caller's, by as
    /// many processes as their limit of open files asks for. All there on
    /// return.
    pub fn crowd(namespace: &Namespace, port: u16, connections: u32) -> Vec<Self> {
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        // Two files a connection, some for the process itself; a source
        // address has no more than 28,000 ports.
        let most = maximum.map_or(8_000, |files| files.saturating_sub(100) / 2);
        let most = u32::try_from(most).unwrap().min(8_000);
        let mut left = connections;
        let mut crowd = Vec::new();
        while left > 0 {
            let at = u8::try_from(crowd.len() + 1).expect("a usable limit of open files");
            let address = Ipv4Addr::new(127, 0, 2, at);
            let mut held = Self {
                child: holder(namespace, address, port, left.min(most)),
                namespace: None,
            };
            held.wait();
            crowd.push(held);
            left -= left.min(most);
        }
        crowd
    }

    /// Until all connections are there.
    pub fn wait(&mut self) {
        let output = self.child.stdout.as_mut().unwrap();
        let mut line = Vec::new();
        while !line.ends_with(b"holding\n") {
            let mut byte = [0];
            let read = output.read(&mut byte).unwrap();
            assert_eq!(read, 1, "{}", String::from_utf8_lossy(&line));
            line.extend(byte);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // The name first: the process alone keeps the namespace then.
        drop(self.namespace.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that holds connections inside a namespace.
fn holder(namespace: &Namespace, address: Ipv4Addr, port: u16, connections: u32) -> Child {
    Command::new("ip")
        .args(["netns", "exec", &namespace.name])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "held::hold", "--ignored", "--nocapture"])
        .env(
            "CONNMON_TEST_HOLD",
            format!("{address}:{port} {connections}"),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Run by [`Held`] inside a namespace.
#[test]
#[ignore = "run by other tests, in namespaces of theirs"]
fn hold() {
    let Ok(wanted) = std::env::var("CONNMON_TEST_HOLD") else {
        return;
    };
    let (address, connections) = wanted.split_once(' ').unwrap();
    let address: SocketAddr = address.parse().unwrap();
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = maximum;
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
    let listener = TcpListener::bind(address).unwrap();
    let held: Vec<_> = (0..connections.parse::<u32>().unwrap())
        .map(|_| {
            (
                TcpStream::connect(address).unwrap(),
                listener.accept().unwrap(),
            )
        })
        .collect();
    println!("holding");
    let _ = std::io::stdin().read(&mut [0]);
    drop(held);
}
