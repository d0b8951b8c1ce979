//! Connections at full speed in a network namespace of their own, and a count
//! of them by this process, without the time that starting `ss` takes.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use connmon_common::state;
use connmon_host::reconcile::diag::{self, DumpBuffer, States};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::Socket;

use crate::harness::PATIENCE;
use crate::namespaces::Namespace;

/// The right to load the machine. Every agent sees every event and this
/// machine may have two CPUs only: loads of two tests at once would measure
/// each other.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    // A test that failed has dropped its load.
    let guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = maximum;
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
    guard
}

/// Reports what a test could not judge on this machine, and why. It is counted
/// and printed; the test checks the same in another way.
pub fn inconclusive(what: &str, reason: &str) {
    println!("inconclusive: {what}: {reason}");
}

/// The short form of a parameter, or the long one.
pub fn scale<T>(short: T, long: T) -> T {
    if std::env::var_os("CONNMON_STORM").is_some_and(|storm| storm == "long") {
        long
    } else {
        short
    }
}

/// Counts sockets in the namespace it was made in.
pub struct Counter(diag::Socket, DumpBuffer);

impl Counter {
    pub fn new(namespace: &Namespace) -> Self {
        let socket = namespace.run(|| diag::Socket::open().unwrap());
        Self(socket, DumpBuffer::default())
    }

    /// (ESTABLISHED, open in any state), IPv4, either end on this port.
    pub fn count(&mut self, port: u16) -> (f64, f64) {
        let mut rows = Vec::new();
        let complete = self
            .0
            .dump(States::OPEN, false, &mut self.1, &mut 0, |row| {
                if [row.tuple.local_port, row.tuple.remote_port].contains(&port) {
                    rows.push((row.cookie, row.state));
                }
                true
            });
        assert!(matches!(complete, diag::Dumped::Complete), "{complete:?}");
        // A dump under changes may bring a socket twice.
        rows.sort_unstable_by_key(|(cookie, _)| *cookie);
        rows.dedup_by_key(|(cookie, _)| *cookie);
        let established = rows
            .iter()
            .filter(|(_, state)| *state == state::ESTABLISHED);
        (established.count() as f64, rows.len() as f64)
    }
}

/// Connections opened and reset as fast as this machine can, with some alive
/// at any time. The caller holds [`alone`].
pub struct Load {
    port: u16,
    counter: Mutex<Counter>,
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<()>>,
    _namespace: Namespace,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    pause: AtomicBool,
    paused: AtomicUsize,
    opened: AtomicU64,
    closed: AtomicU64,
    /// Rest after each [`BURST`], microseconds.
    rest: AtomicU64,
}

/// Connections between two looks at [`Shared`].
const BURST: usize = 16;

impl Load {
    /// Returns once `alive` connections a client are held and as many have
    /// been replaced.
    pub fn start(port: u16, clients: usize, alive: usize) -> Self {
        let namespace = Namespace::new();
        let shared = Arc::new(Shared::default());
        let load = Self {
            port,
            counter: Mutex::new(Counter::new(&namespace)),
            shared: Arc::clone(&shared),
            // A thread is born into the namespace of its parent.
            clients: namespace.run(|| {
                (1..=clients)
                    .map(|at| {
                        let shared = Arc::clone(&shared);
                        // Each has a listener of its own, so that it can
                        // accept what it opened and close both ends.
                        let address = SocketAddr::from((Ipv4Addr::new(127, 0, 1, at as u8), port));
                        std::thread::spawn(move || client(address, alive, &shared))
                    })
                    .collect()
            }),
            _namespace: namespace,
        };
        load.until_changed(3 * (clients * alive) as u64);
        load
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connections opened so far.
    pub fn opened(&self) -> u64 {
        self.shared.opened.load(Ordering::Relaxed)
    }

    /// Connections opened and closed so far; what its clients are doing right
    /// now, one each, is not in it yet.
    pub fn changes(&self) -> u64 {
        self.opened() + self.shared.closed.load(Ordering::Relaxed)
    }

    /// Waits until [`Load::changes`] has risen to this.
    pub fn until_changed(&self, changes: u64) {
        self.wait("changes of the load", || self.changes() >= changes);
    }

    /// Sockets in ESTABLISHED as the kernel's table has them.
    pub fn established(&self) -> f64 {
        self.counter.lock().unwrap().count(self.port).0
    }

    /// Holds what it holds, until resumed.
    pub fn pause(&self) {
        self.shared.pause.store(true, Ordering::SeqCst);
        self.wait("the load's pause", || {
            self.shared.paused.load(Ordering::SeqCst) == self.clients.len()
        });
    }

    pub fn resume(&self) {
        self.shared.pause.store(false, Ordering::SeqCst);
        self.wait("the load's return", || {
            self.shared.paused.load(Ordering::SeqCst) == 0
        });
    }

    /// Makes it slower, each time by more.
    pub fn slow_down(&self) {
        let rest = self.shared.rest.load(Ordering::Relaxed);
        self.shared.rest.store(2 * rest + 200, Ordering::Relaxed);
    }

    fn wait(&self, what: &str, done: impl Fn() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !done() {
            let ended = self.clients.iter().any(JoinHandle::is_finished);
            assert!(!ended, "a client of the load ended by itself");
            assert!(Instant::now() < until, "{what} never came");
            sleep(Duration::from_millis(1));
        }
    }

    /// Ends it and returns how many connections there were.
    pub fn stop(mut self) -> u64 {
        let clients = std::mem::take(&mut self.clients);
        self.end(clients, |ended| ended.unwrap());
        // A reset closes both ends, once it is delivered.
        let until = Instant::now() + PATIENCE;
        while self.counter.lock().unwrap().count(self.port).1 > 0.0 {
            assert!(Instant::now() < until, "a connection outlives its reset");
            sleep(Duration::from_millis(10));
        }
        self.opened()
    }

    fn end(&self, clients: Vec<JoinHandle<()>>, ended: fn(std::thread::Result<()>)) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.pause.store(false, Ordering::SeqCst);
        for client in clients {
            ended(client.join());
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let clients = std::mem::take(&mut self.clients);
        self.end(clients, |_| ());
    }
}

fn client(address: SocketAddr, alive: usize, shared: &Shared) {
    let listener = TcpListener::bind(address).unwrap();
    let mut pool = VecDeque::new();
    while !shared.stop.load(Ordering::SeqCst) {
        if shared.pause.load(Ordering::SeqCst) {
            shared.paused.fetch_add(1, Ordering::SeqCst);
            while shared.pause.load(Ordering::SeqCst) {
                sleep(Duration::from_millis(1));
            }
            shared.paused.fetch_sub(1, Ordering::SeqCst);
        }
        for _ in 0..BURST {
            let client = Socket::from(TcpStream::connect(address).unwrap());
            client.set_linger(Some(Duration::ZERO)).unwrap();
            let (server, _) = listener.accept().unwrap();
            pool.push_back((client, server));
            shared.opened.fetch_add(1, Ordering::Relaxed);
            if pool.len() > alive {
                // In this order: the reset closes the other end as well.
                pool.pop_front();
                shared.closed.fetch_add(1, Ordering::Relaxed);
            }
        }
        let rest = shared.rest.load(Ordering::Relaxed);
        if rest > 0 {
            sleep(Duration::from_micros(rest));
        }
    }
}
