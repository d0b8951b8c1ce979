//! Made-up traffic for a look at connmon: two network namespaces, a country
//! database that maps their 10.x addresses, and a bounded number of
//! connections between them.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Socket, Type};

use crate::{database, exec};

/// The machine that is watched, and everybody else.
const HERE: &str = "connmon-demo-here";
const WORLD: &str = "connmon-demo-world";

/// Its address; `10.N.0.0/16` is country N of the list, from 1.
const OWN: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);
const OWN_NETWORK: &str = "10.200.0.0/16";

/// Countries, the busy ones first: connections thin out along the list.
const COUNTRIES: [&str; 40] = [
    "US", "DE", "FR", "GB", "JP", "BR", "IN", "NL", "CA", "AU", "PL", "SE", "ES", "IT", "KR", "MX",
    "ZA", "AR", "SG", "NG", "TR", "CH", "AT", "NO", "FI", "DK", "CZ", "PT", "IE", "NZ", "CL", "CO",
    "EG", "KE", "VN", "TH", "ID", "UA", "RO", "GR",
];

/// Ports that this machine serves, and that the world serves.
const INBOUND_PORTS: [u16; 3] = [443, 80, 22];
const OUTBOUND_PORTS: [u16; 4] = [443, 80, 5432, 53];

/// Connections a second and direction.
const RATE: u32 = 20;
/// Most connections held open by one direction.
const HELD: usize = 300;

/// Runs the agent on made-up traffic until it ends, then cleans up.
///
/// # Errors
/// Without root or iproute2, or when the agent cannot be started.
pub fn run(agent: &Path, args: &[OsString]) -> Result<ExitCode> {
    anyhow::ensure!(
        exec::is_root(),
        "the demo makes network namespaces: needs root"
    );
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("cannot handle signals")?;
    }
    let _networks = Networks::make()?;
    let files = Files::make()?;
    let database = files.database()?;
    let traffic = traffic(&stop)?;
    let mut command = Command::new(agent);
    command
        .env("CONNMON_DEMO", "1")
        .arg("--geoip.database")
        .arg(&database)
        // The far ends of the same connections would show this machine.
        .args(["--filter.exclude", OWN_NETWORK])
        .args(args);
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start `{}`", exec::shown(&command)))?;
    let status = wait(&mut child, &stop);
    stop.store(true, Ordering::Relaxed);
    for thread in traffic {
        // A thread that panicked has printed its panic.
        let _ = thread.join();
    }
    Ok(match status?.code() {
        Some(0) => ExitCode::SUCCESS,
        Some(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        None => ExitCode::FAILURE,
    })
}

/// Waits for the agent; a signal to us alone is passed on to it.
fn wait(child: &mut Child, stop: &AtomicBool) -> Result<ExitStatus> {
    let mut passed_on = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if stop.load(Ordering::Relaxed) && !passed_on {
            passed_on = true;
            exec::run(Command::new("kill").args(["-TERM", &child.id().to_string()]))?;
        }
        sleep(Duration::from_millis(50));
    }
}

/// Both namespaces; gone when dropped.
struct Networks;

impl Networks {
    fn make() -> Result<Self> {
        // What an earlier demo that was killed has left.
        remove();
        let networks = Self;
        for name in [HERE, WORLD] {
            ip(&["netns", "add", name])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        ip(&[
            "link", "add", "name", "demo0", "netns", HERE, "type", "veth", "peer", "name", "demo0",
            "netns", WORLD,
        ])?;
        ip(&[
            "-n",
            HERE,
            "addr",
            "add",
            &format!("{OWN}/8"),
            "dev",
            "demo0",
        ])?;
        for index in 0..COUNTRIES.len() {
            let address = format!("{}/8", address(index));
            ip(&["-n", WORLD, "addr", "add", &address, "dev", "demo0"])?;
        }
        for name in [HERE, WORLD] {
            ip(&["-n", name, "link", "set", "demo0", "up"])?;
        }
        Ok(networks)
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        remove();
    }
}

fn remove() {
    for name in [HERE, WORLD] {
        if Path::new("/run/netns").join(name).exists()
            && let Err(error) = ip(&["netns", "delete", name])
        {
            eprintln!("{error:#}");
        }
    }
}

fn ip(args: &[&str]) -> Result<()> {
    exec::run(Command::new("ip").args(args))
}

fn address(country: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, country as u8 + 1, 0, 1)
}

/// A directory for the database, root's own; gone when dropped. Not the build
/// directory: sudo has dropped the variable that names it.
struct Files(PathBuf);

impl Files {
    fn make() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("connmon-demo-{}", std::process::id()));
        // Fails where anything is: nobody else's link is followed.
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    /// The database as a file.
    fn database(&self) -> Result<PathBuf> {
        let path = self.0.join("demo.mmdb");
        let network = |index| format!("10.{}.0.0/16", index + 1);
        database::make_up(
            &path,
            COUNTRIES
                .iter()
                .enumerate()
                .map(|(at, code)| (network(at), code)),
        )?;
        Ok(path)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Every thread that makes traffic.
fn traffic(stop: &Arc<AtomicBool>) -> Result<Vec<JoinHandle<()>>> {
    let mut threads = Vec::new();
    for (home, ports) in [(HERE, &INBOUND_PORTS[..]), (WORLD, &OUTBOUND_PORTS[..])] {
        for &port in ports {
            threads.push(inside(home, stop, move |stop| serve(port, stop))?);
        }
    }
    threads.push(inside(HERE, stop, |stop| clients(false, stop))?);
    threads.push(inside(WORLD, stop, |stop| clients(true, stop))?);
    Ok(threads)
}

/// A thread in a namespace.
fn inside(
    namespace: &str,
    stop: &Arc<AtomicBool>,
    work: impl FnOnce(&AtomicBool) -> std::io::Result<()> + Send + 'static,
) -> Result<JoinHandle<()>> {
    let path = Path::new("/run/netns").join(namespace);
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    let stop = Arc::clone(stop);
    let thread = std::thread::Builder::new()
        .name("demo".into())
        .spawn(move || {
            let entered = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network));
            let result = entered.map_err(Into::into).and_then(|()| work(&stop));
            if let Err(error) = result {
                eprintln!("demo traffic: {error}");
            }
        })?;
    Ok(thread)
}

/// Accepts, answers each request, keeps what is open open.
fn serve(port: u16, stop: &AtomicBool) -> std::io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    listener.set_nonblocking(true)?;
    let mut held = VecDeque::new();
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        while let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(true)?;
            held.push_back(stream);
        }
        held.retain_mut(|stream: &mut TcpStream| match stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(count) => stream.write_all(&buffer[..count]).is_ok(),
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        });
        while held.len() > HELD {
            held.pop_front();
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Opens, talks, holds and closes connections: from the world to this
/// machine, or the other way.
fn clients(from_world: bool, stop: &AtomicBool) -> std::io::Result<()> {
    let mut dice = Dice(if from_world { 7 } else { 3 });
    let mut held: VecDeque<(Instant, TcpStream)> = VecDeque::new();
    while !stop.load(Ordering::Relaxed) {
        sleep(Duration::from_secs(1) / RATE);
        let country = address(dice.skewed(COUNTRIES.len()));
        let (local, remote, ports) = if from_world {
            (country, OWN, &INBOUND_PORTS[..])
        } else {
            (OWN, country, &OUTBOUND_PORTS[..])
        };
        // Now and then somebody knocks at a port where nobody is.
        let port = match dice.below(25) {
            0 => 8081,
            _ => ports[dice.skewed(ports.len())],
        };
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((local, 0)).into())?;
        let connected = socket.connect_timeout(
            &SocketAddr::from((remote, port)).into(),
            Duration::from_secs(1),
        );
        if connected.is_ok() {
            let mut stream = TcpStream::from(socket);
            let payload = vec![b'.'; 100 + dice.below(3000)];
            // The other end may have dropped its oldest meanwhile.
            let _ = stream.write_all(&payload);
            let seconds = 1 + dice.below(30) as u64;
            held.push_back((Instant::now() + Duration::from_secs(seconds), stream));
        }
        held.retain(|(until, _)| Instant::now() < *until);
        while held.len() > HELD {
            held.pop_front();
        }
    }
    Ok(())
}

/// Numbers that only have to look random.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        // Knuth's MMIX generator; its high bits are the good ones.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    /// Small numbers more often than large ones.
    fn skewed(&mut self, bound: usize) -> usize {
        let scale = 1 << 20;
        let share = self.below(scale) as f64 / scale as f64;
        ((share * share * share) * bound as f64) as usize
    }
}
