//! A network namespace for every socket of this binary and of the agents it
//! starts, so that nothing else on the machine is counted, and a router next
//! to it.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::panic::resume_unwind;
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Our end of the link to the router.
pub const OURS: &str = "10.77.0.1";
/// On our link, with nobody there.
pub const NOBODY: &str = "10.77.0.9";
/// The router's end of our link.
pub const ROUTER: &str = "10.77.0.2";
/// Behind the router, which knows no way.
pub const BEYOND: &str = "10.99.0.1";

/// Addresses of both ends: each knows the other without asking, so that a
/// link that loses everything loses no ARP.
const OUR_MAC: &str = "02:00:0a:4d:00:01";
const ROUTER_MAC: &str = "02:00:0a:4d:00:02";

/// Both namespaces; deleted when dropped.
pub struct Network {
    own: String,
    router: String,
    /// Whether there is a router; without veth there is none.
    pub routed: Result<(), String>,
}

impl Network {
    /// Makes them and moves the calling thread, and so all it starts later.
    pub fn enter() -> Self {
        let own = format!("xtask-k{}", std::process::id());
        let router = format!("xtask-r{}", std::process::id());
        for name in [&own, &router] {
            ip(&["netns", "add", name]).expect("a network namespace");
            ip(&["-n", name, "link", "set", "lo", "up"]).expect("lo goes up");
        }
        let routed = route(&own, &router);
        let file = File::open(format!("/run/netns/{own}")).expect("the namespace is there");
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("entering the namespace");
        // A guest with little memory has room for fewer sockets in TIME_WAIT than
        // the scenarios may leave in a minute. Beyond it a FIN gets a RST.
        std::fs::write("/proc/sys/net/ipv4/tcp_max_tw_buckets", "262144")
            .expect("room for sockets in TIME_WAIT");
        Self {
            own,
            router,
            routed,
        }
    }
}

impl Network {
    /// Runs `there` in the router's namespace.
    pub fn at_router<T: Send>(&self, there: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{}", self.router)).expect("it is there");
        let enter = move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("entering the namespace");
            there()
        };
        std::thread::scope(|scope| scope.spawn(enter).join())
            .unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// A listener on the other side of our link, at a port of its own that is
    /// no ephemeral one: they show directions.
    pub fn listen_at_router(&self) -> TcpListener {
        static NEXT: AtomicU16 = AtomicU16::new(8_100);
        let port = NEXT.fetch_add(1, Ordering::Relaxed);
        self.at_router(|| TcpListener::bind((ROUTER, port)).expect("listening"))
    }
}

fn route(own: &str, router: &str) -> Result<(), String> {
    let link = ["link", "add", "k0", "address", OUR_MAC, "type", "veth"];
    let peer = ["peer", "name", "r0", "address", ROUTER_MAC, "netns", router];
    ip(&[&["-n", own][..], &link, &peer].concat())?;
    ip(&["-n", own, "address", "add", "10.77.0.1/24", "dev", "k0"])?;
    ip(&["-n", router, "address", "add", "10.77.0.2/24", "dev", "r0"])?;
    ip(&["-n", own, "link", "set", "k0", "up"])?;
    ip(&["-n", router, "link", "set", "r0", "up"])?;
    for (namespace, device, address, mac) in [
        (own, "k0", ROUTER, ROUTER_MAC),
        (router, "r0", OURS, OUR_MAC),
    ] {
        let neighbour = ["neighbour", "replace", address, "lladdr", mac];
        let known = ["nud", "permanent", "dev", device];
        ip(&[&["-n", namespace][..], &neighbour, &known].concat())?;
    }
    ip(&["-n", own, "route", "add", "default", "via", "10.77.0.2"])?;
    let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
    ip(&["netns", "exec", router, "sh", "-c", forward])
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in [&self.own, &self.router] {
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

/// Runs `ip`.
pub fn ip(args: &[&str]) -> Result<(), String> {
    run("ip", args)
}

fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{program} {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}

/// What a queueing discipline does to all that we send over our link, until
/// dropped.
pub struct Qdisc(());

impl Qdisc {
    /// netem; `Err` where this kernel lacks it.
    pub fn add(netem: &[&str]) -> Result<Self, String> {
        Self::of("netem", netem)
    }

    /// `Err` where this kernel lacks it.
    pub fn of(kind: &str, args: &[&str]) -> Result<Self, String> {
        let add = ["qdisc", "add", "dev", "k0", "root", kind];
        run("tc", &[&add[..], args].concat()).map(|()| Self(()))
    }
}

/// A filter of our namespace that drops one in so many packets to a port as
/// they leave, until dropped.
pub struct PacketFilter(());

impl PacketFilter {
    /// `Err` where nft or the kernel's part of it is missing.
    pub fn add(port: u16, one_in: u32) -> Result<Self, String> {
        let rules = format!(
            "table ip kernel_test {{ chain out {{ type filter hook output priority 0; \
             tcp dport {port} numgen random mod {one_in} == 0 drop; }}; }}"
        );
        run("nft", &[&rules]).map(|()| Self(()))
    }
}

impl Drop for PacketFilter {
    fn drop(&mut self) {
        let _ = run("nft", &["delete table ip kernel_test"]);
    }
}

impl Drop for Qdisc {
    fn drop(&mut self) {
        let _ = run("tc", &["qdisc", "delete", "dev", "k0", "root"]);
    }
}

/// A network sysctl of our namespace, set back when dropped.
pub struct Sysctl {
    path: String,
    before: String,
}

impl Sysctl {
    /// `Err` where this kernel lacks it.
    pub fn set(name: &str, value: &str) -> Result<Self, String> {
        let path = format!("/proc/sys/net/{name}");
        let before = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        std::fs::write(&path, value).map_err(|error| format!("{path}: {error}"))?;
        Ok(Self { path, before })
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.path, &self.before);
    }
}
