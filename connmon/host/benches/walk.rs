//! What a walk costs beside a bare read-and-discard of the same dump:
//! `cargo bench -p connmon-host --bench walk`, as root.
//!
//! `CONNMON_BENCH_SOCKETS` (default 100,000) sockets are held by processes of
//! at most 18,000 descriptors in a network namespace of their own. Rounds
//! alternate between the two. The medians of the reading thread's CPU time are
//! compared; beyond 1.3 the exit code is 1.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use connmon_core::scan::{Trigger, Walk, WalkMessage};
use connmon_host::reconcile::{WalkMessages, Walker, WalkerOptions};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, socket_with,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, hold, network, connections] = arguments.as_slice()
        && hold == "hold"
    {
        hold_connections(network.parse().unwrap(), connections.parse().unwrap());
        return ExitCode::SUCCESS;
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: walk bench: needs root");
        return ExitCode::SUCCESS;
    }
    let sockets: u32 = number("CONNMON_BENCH_SOCKETS", 100_000);
    let rounds: usize = number("CONNMON_BENCH_ROUNDS", 24) as usize;
    let namespace = Namespace::new();
    let holders = Holder::fill(sockets / 2);

    let mut walks = Walks::new();
    let mut readings = Readings::default();
    for round in 0..=rounds {
        let discard = [read_and_discard(false), read_and_discard(true)];
        let walk = [walks.run(false), walks.run(true)];
        for (seen, what) in [discard[0].sockets, discard[1].sockets]
            .into_iter()
            .chain([walk[0].sockets, walk[1].sockets])
            .zip(["dump", "dump with traffic", "walk", "walk with traffic"])
        {
            assert!(seen >= sockets, "{what}: {seen} of {sockets} sockets");
        }
        if round > 0 {
            readings.note(&discard, &walk);
        }
    }
    println!(
        "{sockets} sockets in {} processes, {rounds} rounds, medians:",
        holders.len()
    );
    let bounded = readings.report();
    drop(holders);
    drop(namespace);
    if bounded {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// One reading of all sockets.
#[derive(Clone, Copy)]
struct Reading {
    sockets: u32,
    wall: Duration,
    /// CPU time of the thread that read.
    cpu: Duration,
}

#[derive(Default)]
struct Readings {
    discard: [Vec<Reading>; 2],
    walk: [Vec<Reading>; 2],
}

impl Readings {
    fn note(&mut self, discard: &[Reading; 2], walk: &[Reading; 2]) {
        for info in 0..2 {
            self.discard[info].push(discard[info]);
            self.walk[info].push(walk[info]);
        }
    }

    fn report(&self) -> bool {
        let mut bounded = true;
        for (info, what) in ["sockets", "sockets with traffic"].into_iter().enumerate() {
            let median = |readings: &[Reading], time: fn(&Reading) -> Duration| {
                let mut times: Vec<_> = readings.iter().map(time).collect();
                times.sort_unstable();
                times[times.len() / 2]
            };
            let times = |time: fn(&Reading) -> Duration| {
                let (discard, walk) = (
                    median(&self.discard[info], time),
                    median(&self.walk[info], time),
                );
                let ratio = walk.as_secs_f64() / discard.as_secs_f64();
                (discard, walk, ratio)
            };
            for (time, (discard, walk, ratio)) in [
                ("CPU", times(|reading| reading.cpu)),
                ("wall", times(|reading| reading.wall)),
            ] {
                println!(
                    "{what}, {time}: read and discard {discard:.1?}, walk {walk:.1?}, ratio {ratio:.2}"
                );
                bounded &= time != "CPU" || ratio <= BOUND;
            }
        }
        bounded
    }
}

const BOUND: f64 = 1.3;

fn number(variable: &str, default: u32) -> u32 {
    std::env::var(variable).map_or(default, |text| text.parse().expect(variable))
}

struct Walks {
    walker: Walker,
    messages: WalkMessages,
}

impl Walks {
    fn new() -> Self {
        let (walker, messages) = Walker::spawn(WalkerOptions {
            // Its own namespace, which is the one with the sockets.
            all_netns: true,
            listeners: true,
            ..WalkerOptions::default()
        })
        .unwrap();
        Self { walker, messages }
    }

    fn run(&mut self, traffic: bool) -> Reading {
        let walk = Walk {
            trigger: Trigger::Interval,
            traffic,
            audit: true,
        };
        let mut sockets = 0;
        self.walker.request(walk).unwrap();
        loop {
            match self.messages.blocking_next().unwrap() {
                WalkMessage::Rows { rows, .. } => sockets += rows.len() as u32,
                WalkMessage::End(summary) => {
                    return Reading {
                        sockets,
                        wall: Duration::from_nanos(summary.duration_ns),
                        cpu: Duration::from_nanos(summary.cpu_ns),
                    };
                }
                _ => {}
            }
        }
    }
}

/// The least a reader can do: both families, the same states, the messages'
/// types and nothing more.
fn read_and_discard(info: bool) -> Reading {
    let (begin, cpu) = (Instant::now(), thread_cpu());
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        flags,
        Some(netlink::SOCK_DIAG),
    )
    .unwrap();
    let mut buffer = vec![0_u8; 32 * 1024];
    let mut sockets = 0;
    for family in [2_u8, 10] {
        let mut request = [0_u8; 72];
        request[..4].copy_from_slice(&72_u32.to_ne_bytes());
        request[4..6].copy_from_slice(&20_u16.to_ne_bytes());
        request[6..8].copy_from_slice(&0x301_u16.to_ne_bytes());
        request[16..19].copy_from_slice(&[family, 6, if info { 2 } else { 0 }]);
        request[20..24].copy_from_slice(&0b1111_0011_1110_u32.to_ne_bytes());
        rustix::net::send(&socket, &request, SendFlags::empty()).unwrap();
        'dump: loop {
            let (read, ..) =
                rustix::net::recv(&socket, &mut buffer[..], RecvFlags::empty()).unwrap();
            let mut at = 0;
            while at < read {
                let length = u32::from_ne_bytes(buffer[at..at + 4].try_into().unwrap());
                let kind = u16::from_ne_bytes(buffer[at + 4..at + 6].try_into().unwrap());
                if kind != 20 {
                    break 'dump;
                }
                sockets += 1;
                at += length as usize;
            }
        }
    }
    Reading {
        sockets,
        wall: begin.elapsed(),
        cpu: thread_cpu() - cpu,
    }
}

fn thread_cpu() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// The namespace that the bench moves into before it starts any thread.
struct Namespace(String);

impl Namespace {
    fn new() -> Self {
        let name = format!("reconcile-bench-{}", std::process::id());
        let run = |arguments: &[&str]| {
            assert!(
                Command::new("ip")
                    .args(arguments)
                    .status()
                    .unwrap()
                    .success()
            );
        };
        run(&["netns", "add", &name]);
        run(&["-n", &name, "link", "set", "lo", "up"]);
        let file = File::open(format!("/run/netns/{name}")).unwrap();
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        Self(name)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.0])
            .status();
    }
}

/// A process that holds connections until its standard input closes.
struct Holder(Child);

impl Holder {
    fn fill(connections: u32) -> Vec<Self> {
        let mut left = connections;
        let mut holders = Vec::new();
        while left > 0 {
            let now = left.min(CONNECTIONS_PER_HOLDER);
            left -= now;
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["hold", &holders.len().to_string(), &now.to_string()])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
            holders.push(Self(child));
        }
        holders
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// 20,000 descriptors are a usual hard limit.
const CONNECTIONS_PER_HOLDER: u32 = 9_000;

fn hold_connections(network: u16, connections: u32) {
    let [high, low] = network.to_be_bytes();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        ..limit
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    // One address per holder, so that local ports suffice.
    let address = Ipv4Addr::new(127, 1 + high, low, 1);
    let listener = TcpListener::bind(SocketAddr::from((address, 0))).unwrap();
    let to = listener.local_addr().unwrap();
    let mut held: Vec<OwnedFd> = Vec::new();
    for _ in 0..connections {
        let socket = socket_with(
            AddressFamily::INET,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        rustix::net::connect(&socket, &to).unwrap();
        held.push(socket);
        held.push(listener.accept().unwrap().0.into());
    }
    std::io::stdout().write_all(&[1]).unwrap();
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
}
