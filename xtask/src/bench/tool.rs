//! Load, held sockets and scrapes, each in a process of its own, so that it can
//! be pinned and counted apart from what it measures.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::{Subcommand, ValueEnum};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, socket_with,
};
use rustix::thread::{CpuSet, sched_setaffinity};
use socket2::{Domain, Socket, Type};

use super::table;

/// IPPROTO_TCP (`include/uapi/linux/in.h`).
const IPPROTO_TCP: u8 = 6;

/// `cargo xtask bench-tool`; called by `bench` alone.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Pin to this processor
    #[arg(long)]
    cpu: Option<usize>,
    #[command(subcommand)]
    tool: Tool,
}

#[derive(Debug, Subcommand)]
enum Tool {
    /// Open and close loopback connections; prints `connections seconds`
    Load {
        #[arg(long)]
        seconds: f64,
        /// Connections per second; as many as possible without
        #[arg(long)]
        rate: Option<u32>,
        #[arg(long, value_enum, default_value_t = Close::Rst)]
        close: Close,
    },
    /// Hold loopback connections until stdin ends; prints `ready` when held
    Hold {
        #[arg(long)]
        connections: u32,
        /// Local network 127.N.0.0/16
        #[arg(long)]
        network: u8,
    },
    /// Connect from 127.1.0.1, 127.2.0.1, … to some ports of 127.0.0.1 and
    /// hold that until stdin ends; prints `ready` when held
    Spread {
        /// Addresses, and so countries
        #[arg(long)]
        addresses: u8,
        #[arg(long)]
        ports: u16,
    },
    /// Dump the machine's sockets by sock_diag and look at no more than the
    /// messages' types; prints the median of five times in seconds
    Discard,
    /// GET a page many times; prints latencies in microseconds
    Scrape {
        #[arg(long)]
        address: SocketAddr,
        #[arg(long, default_value = "/metrics")]
        path: String,
        #[arg(long, default_value_t = 1)]
        clients: u8,
        #[arg(long)]
        scrapes: u32,
        #[arg(long)]
        gzip: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Close {
    /// FIN from the client first: ten state events
    Fin,
    /// RST from the client: six
    Rst,
}

/// Runs one tool.
///
/// # Errors
/// When sockets cannot be had.
pub fn run(args: &Args) -> Result<ExitCode> {
    if let Some(cpu) = args.cpu {
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set).context("cannot pin")?;
    }
    match &args.tool {
        Tool::Load {
            seconds,
            rate,
            close,
        } => load(Duration::from_secs_f64(*seconds), *rate, *close)?,
        Tool::Hold {
            connections,
            network,
        } => hold(*connections, *network)?,
        Tool::Discard => discard()?,
        Tool::Spread { addresses, ports } => spread(*addresses, *ports)?,
        Tool::Scrape {
            address,
            path,
            clients,
            scrapes,
            gzip,
        } => scrape(*address, path, *clients, *scrapes, *gzip)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn wait_for_end() -> Result<()> {
    println!("ready");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// The least a reader of both families can do.
fn discard() -> Result<()> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )?;
    let mut buffer = vec![0; 32 * 1024];
    let mut times = Vec::new();
    for _ in 0..5 {
        let started = Instant::now();
        for family in [AddressFamily::INET, AddressFamily::INET6] {
            // struct nlmsghdr and struct inet_diag_req_v2: SOCK_DIAG_BY_FAMILY,
            // NLM_F_REQUEST | NLM_F_DUMP, the states that an audit asks for.
            let mut request = [0; 72];
            request[..4].copy_from_slice(&72_u32.to_ne_bytes());
            request[4..6].copy_from_slice(&20_u16.to_ne_bytes());
            request[6..8].copy_from_slice(&0x301_u16.to_ne_bytes());
            request[16] = family.as_raw() as u8;
            request[17] = IPPROTO_TCP;
            request[20..24].copy_from_slice(&0b1111_0011_1110_u32.to_ne_bytes());
            rustix::net::send(&socket, &request, SendFlags::empty())?;
            loop {
                let (read, _) = rustix::net::recv(&socket, &mut buffer[..], RecvFlags::empty())?;
                if !more(&buffer[..read])? {
                    break;
                }
            }
        }
        times.push(started.elapsed().as_secs_f64());
    }
    println!("{}", table::median(&times));
    Ok(())
}

/// Whether a datagram holds sockets only, not the end of the dump.
fn more(mut datagram: &[u8]) -> Result<bool> {
    while let Some((length, rest)) = datagram.split_first_chunk::<4>() {
        if rest[..2] != 20_u16.to_ne_bytes() {
            return Ok(false);
        }
        datagram = datagram
            .get(u32::from_ne_bytes(*length) as usize..)
            .context("a cut netlink message")?;
    }
    Ok(true)
}

fn spread(addresses: u8, ports: u16) -> Result<()> {
    let servers = (0..ports)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect::<std::io::Result<Vec<_>>>()
        .context("cannot listen")?;
    let mut held = Vec::new();
    for n in 0..u16::from(addresses).max(ports) {
        let server = &servers[usize::from(n % ports)];
        let address = Ipv4Addr::new(127, 1 + (n % u16::from(addresses)) as u8, 0, 1);
        let client = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        client.bind(&SocketAddr::from((address, 0)).into())?;
        client.connect(&server.local_addr()?.into())?;
        held.push((client, server.accept()?));
    }
    wait_for_end()
}

fn load(time: Duration, rate: Option<u32>, close: Close) -> Result<()> {
    // Several addresses, so that FIN closes do not run out of ports.
    let listeners = (1..=16)
        .map(|host| TcpListener::bind((Ipv4Addr::new(127, 9, 0, host), 0)))
        .collect::<std::io::Result<Vec<_>>>()
        .context("cannot listen")?;
    let addresses = listeners
        .iter()
        .map(TcpListener::local_addr)
        .collect::<std::io::Result<Vec<_>>>()?;
    let started = Instant::now();
    let mut count: u64 = 0;
    while started.elapsed() < time {
        if let Some(rate) = rate {
            let due = started + Duration::from_secs_f64(count as f64 / f64::from(rate));
            if let Some(early) = due.checked_duration_since(Instant::now()) {
                // Bursts of a millisecond, as a busy server sees them.
                std::thread::sleep(early.max(Duration::from_millis(1)));
            }
        }
        let at = count as usize % listeners.len();
        let client = TcpStream::connect(addresses[at]).context("cannot connect")?;
        let (server, _) = listeners[at].accept().context("cannot accept")?;
        if close == Close::Rst {
            let client = Socket::from(client);
            client.set_linger(Some(Duration::ZERO))?;
            drop(client);
        } else {
            drop(client);
        }
        drop(server);
        count += 1;
    }
    println!("{count} {}", started.elapsed().as_secs_f64());
    Ok(())
}

fn hold(connections: u32, network: u8) -> Result<()> {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    listener.bind(&SocketAddr::from((Ipv4Addr::new(127, network, 0, 1), 0)).into())?;
    listener.listen(1024)?;
    let listener = TcpListener::from(listener);
    let address = listener.local_addr()?;
    let mut held = Vec::with_capacity(connections as usize * 2);
    for _ in 0..connections {
        held.push(TcpStream::connect(address).context("cannot connect")?);
        held.push(listener.accept().context("cannot accept")?.0);
    }
    wait_for_end()
}

fn scrape(address: SocketAddr, path: &str, clients: u8, scrapes: u32, gzip: bool) -> Result<()> {
    let encoding = if gzip { "gzip" } else { "identity" };
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept-Encoding: {encoding}\r\n\r\n");
    let threads: Vec<_> = (0..clients)
        .map(|client| {
            let request = request.clone();
            std::thread::spawn(move || -> Result<Vec<u64>> {
                // The server takes at most 16 connections from one address.
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
                let from = Ipv4Addr::new(127, 8, 0, 1 + client / 8);
                socket.bind(&SocketAddr::from((from, 0)).into())?;
                socket.connect(&address.into())?;
                let mut stream = TcpStream::from(socket);
                stream.set_nodelay(true)?;
                let mut buffer = vec![0; 1 << 18];
                let mut took = Vec::with_capacity(scrapes as usize);
                for _ in 0..scrapes {
                    let started = Instant::now();
                    stream.write_all(request.as_bytes())?;
                    answer(&mut stream, &mut buffer)?;
                    took.push(u64::try_from(started.elapsed().as_micros())?);
                }
                Ok(took)
            })
        })
        .collect();
    for thread in threads {
        let took = thread
            .join()
            .map_err(|_| anyhow::anyhow!("a client panicked"))??;
        for micros in took {
            println!("{micros}");
        }
    }
    Ok(())
}

/// Reads one answer, with a Content-Length or in chunks, and keeps no body,
/// since what this costs is in every measured time.
fn answer(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<()> {
    let mut filled = 0;
    let mut read = |buffer: &mut [u8]| -> Result<usize> {
        let read = stream.read(buffer)?;
        anyhow::ensure!(read > 0, "the server closed the connection");
        Ok(read)
    };
    let body = loop {
        filled += read(&mut buffer[filled..])?;
        if let Some(end) = buffer[..filled].windows(4).position(|at| at == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = std::str::from_utf8(&buffer[..body])?.to_ascii_lowercase();
    anyhow::ensure!(head.starts_with("http/1.1 200"), "{head}");
    let mut lines = head.lines();
    let Some(length) = lines.find_map(|line| line.strip_prefix("content-length: ")) else {
        while !buffer[..filled].ends_with(b"\r\n0\r\n\r\n") {
            filled += read(&mut buffer[filled..])?;
        }
        return Ok(());
    };
    let mut left = body + length.trim().parse::<usize>()? - filled;
    while left > 0 {
        left = left
            .checked_sub(read(buffer)?)
            .context("more than one answer")?;
    }
    Ok(())
}
