//! Half-open connections and port scans cost no memory.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use connmon_host::reconcile::diag::{self, DumpBuffer, States};
use socket2::{Domain, Protocol, Socket, Type};

use crate::harness::Agent;
use crate::load::alone;
use crate::namespaces::{Namespace, ip, may_run};

/// What an agent may grow by: tables of a fixed size that fill, and what the
/// allocator keeps.
const GROWTH: u64 = 8 << 20;

fn agent() -> Agent {
    let mut args = vec!["--source", "ebpf", "--filter.loopback", "include"];
    args.extend(["--netns", "host"]);
    let agent = Agent::start(&args);
    agent.check_laws();
    agent
}

#[test]
fn a_scan_of_all_ports_is_counted_and_costs_no_memory() {
    if !may_run("a scan of all ports") {
        return;
    }
    let _alone = alone();
    Namespace::new().run(|| {
        let agent = agent();
        let before = agent.memory();
        let own: SocketAddr = agent.address().parse().unwrap();
        let mut refused = 0.0;
        for port in (1..=u16::MAX).filter(|port| *port != own.port()) {
            // One that connects to itself by chance is none.
            refused += f64::from(u8::from(
                TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err(),
            ));
        }
        let scrape = agent.scrape();
        let rise = agent.memory().saturating_sub(before);
        for family in ["port", "country"] {
            let family = format!("connmon_{family}_connect_failures_total");
            let counted = scrape.sum(&family, &[("reason", "refused")]);
            assert_eq!(counted, refused, "{family}");
        }
        println!("{rise} bytes for {refused} refused connects");
        assert!(rise < GROWTH, "{rise} bytes more");
        agent.stop();
    });
}

#[test]
fn a_flood_of_half_open_connections_costs_no_memory() {
    if !may_run("half-open connections") {
        return;
    }
    let _alone = alone();
    const SYNS: u16 = 50_000;
    const PORT: u16 = 7301;
    let namespace = Namespace::new();
    // Answers to 10.9/16 reach nobody.
    let deaf = Namespace::new();
    let inside = |args: &[&str]| ip(&[&["-n", namespace.name.as_str()], args].concat());
    inside(&[
        "link", "add", "cnm0", "type", "veth", "peer", "name", "cnm0", "netns", &deaf.name,
    ]);
    inside(&["addr", "add", "10.9.0.1/16", "dev", "cnm0"]);
    inside(&["link", "set", "cnm0", "arp", "off", "up"]);
    ip(&["-n", &deaf.name, "link", "set", "cnm0", "up"]);
    namespace.run(|| {
        let agent = agent();
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let address = SocketAddr::from((Ipv4Addr::new(10, 9, 0, 1), PORT));
        listener.bind(&address.into()).unwrap();
        listener.listen(4096).unwrap();
        let listener = TcpListener::from(listener);
        let before = agent.memory();
        // The kernel fills in the rest of the header (raw(7)).
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))).unwrap();
        for at in 0..SYNS {
            let from = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 9, 0, 2)) + u32::from(at));
            raw.send_to(&syn(from, address), &address.into()).unwrap();
        }
        let open = half_open(PORT);
        let scrape = agent.scrape();
        let rise = agent.memory().saturating_sub(before);
        println!("{rise} bytes for {SYNS} SYNs, {open} of them half-open");
        assert!(open > 100, "{open} half-open connections are no flood");
        let port = PORT.to_string();
        for family in [
            "connmon_port_connections",
            "connmon_port_connections_opened_total",
        ] {
            assert_eq!(scrape.sum(family, &[("port", &port)]), 0.0, "{family}");
        }
        assert!(rise < GROWTH, "{rise} bytes more");
        agent.stop();
        drop(listener);
    });
}

fn half_open(port: u16) -> usize {
    let mut open = 0;
    let mut socket = diag::Socket::open().unwrap();
    let (states, buffer) = (States::OPENING, &mut DumpBuffer::default());
    let ended = socket.dump(states, false, buffer, &mut 0, |row| {
        open += usize::from(row.tuple.local_port == port);
        true
    });
    assert!(matches!(ended, diag::Dumped::Complete), "{ended:?}");
    open
}

/// An IPv4 packet with a SYN.
fn syn(from: Ipv4Addr, to: SocketAddr) -> [u8; 40] {
    let SocketAddr::V4(to) = to else {
        unreachable!("an IPv4 address")
    };
    let mut packet = [0; 40];
    packet[0] = 0x45;
    packet[3] = 40;
    packet[8] = 64; // TTL
    packet[9] = 6; // TCP
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&to.ip().octets());
    packet[20..22].copy_from_slice(&40_000_u16.to_be_bytes());
    packet[22..24].copy_from_slice(&to.port().to_be_bytes());
    packet[32] = 5 << 4; // words of header
    packet[33] = 2; // SYN
    packet[34..36].copy_from_slice(&u16::MAX.to_be_bytes());
    // Addresses, protocol and length of the segment count too (RFC 9293).
    let words = packet[12..].chunks_exact(2);
    let sum = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum = sum.sum::<u32>() + 6 + 20;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[36..38].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet
}
