//! The direction of a connection whose open was not seen, from the listening
//! sockets of its namespace and its ports.

use std::collections::HashSet;
use std::net::IpAddr;

use super::filter::is_loopback;
use super::ports::PortSet;
use super::snapshot::Direction;
use crate::event::Tuple;

/// Most single addresses with a port; of further listeners the port counts for
/// every address.
const ADDRESSES_MAX: usize = 1 << 16;

/// First port that clients use by default: 32,768 on Linux
/// (`net.ipv4.ip_local_port_range`), 49,152 by RFC 6335. The range of a remote
/// host is not known.
const EPHEMERAL: u16 = 32_768;

/// The listening sockets of one namespace.
#[derive(Clone, Debug, Default)]
pub struct Listening {
    /// Ports of `0.0.0.0`.
    wildcard_v4: PortSet,
    /// Ports of `::`, which accepts IPv4 too: the kernel's tables do not show
    /// `IPV6_V6ONLY`.
    wildcard: PortSet,
    addresses: HashSet<(IpAddr, u16)>,
}

impl Listening {
    /// A socket listens. IPv4-mapped addresses must be given as IPv4.
    pub fn insert(&mut self, address: IpAddr, port: u16) {
        match address {
            IpAddr::V4(address) if address.is_unspecified() => self.wildcard_v4.insert(port),
            IpAddr::V6(address) if address.is_unspecified() => self.wildcard.insert(port),
            _ if self.addresses.len() < ADDRESSES_MAX => {
                self.addresses.insert((address, port));
            }
            _ => self.wildcard.insert(port),
        }
    }

    /// The sockets of another namespace follow.
    pub fn clear(&mut self) {
        self.wildcard_v4.clear();
        self.wildcard.clear();
        self.addresses = HashSet::new();
    }

    /// Whether a socket accepts connections to this local endpoint.
    pub fn accepts(&self, address: IpAddr, port: u16) -> bool {
        self.wildcard.contains(port)
            || address.is_ipv4() && self.wildcard_v4.contains(port)
            || self.addresses.contains(&(address, port))
    }

    /// The direction of a connection: inbound if its local end listens,
    /// outbound if its remote end does in the same namespace. Else its listener
    /// may have ended: outbound if the local port is ephemeral and the remote
    /// one is not. Else unknown. `ephemeral` is the namespace's
    /// `net.ipv4.ip_local_port_range`, inclusive.
    pub fn direction(&self, tuple: &Tuple, ephemeral: (u16, u16)) -> Direction {
        let (local, remote) = (tuple.local_port, tuple.remote_port);
        if self.accepts(tuple.local, local) {
            return Direction::Inbound;
        }
        let is_here = self.addresses.contains(&(tuple.remote, remote))
            || is_loopback(tuple) && self.accepts(tuple.remote, remote);
        let in_range = |port| (ephemeral.0..=ephemeral.1).contains(&port);
        // If both ports are in a range that begins low, the higher one is the
        // client's.
        let is_client =
            in_range(local) && remote < EPHEMERAL && (local >= EPHEMERAL || !in_range(remote));
        if is_here || is_client {
            Direction::Outbound
        } else {
            Direction::Unknown
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: (u16, u16) = (32_768, 60_999);

    fn end(text: &str) -> (IpAddr, u16) {
        let end: std::net::SocketAddr = text.parse().unwrap();
        (end.ip(), end.port())
    }

    fn direction(listening: &[&str], local: &str, remote: &str, range: (u16, u16)) -> Direction {
        let mut all = Listening::default();
        for listener in listening {
            let (address, port) = end(listener);
            all.insert(address, port);
        }
        let ((local, local_port), (remote, remote_port)) = (end(local), end(remote));
        let tuple = Tuple {
            local,
            local_port,
            remote,
            remote_port,
        };
        all.direction(&tuple, range)
    }

    #[test]
    fn a_listener_counts_by_its_address() {
        use Direction::*;
        let (v4, v6) = ("10.0.0.1:40000", "[2001:db8::1]:40000");
        for (listener, expected_v4, expected_v6) in [
            ("0.0.0.0:40000", Inbound, Outbound),
            ("[::]:40000", Inbound, Inbound),
            ("10.0.0.1:40000", Inbound, Outbound),
            ("[2001:db8::1]:40000", Outbound, Inbound),
            ("10.0.0.2:40000", Outbound, Outbound),
            ("0.0.0.0:40001", Outbound, Outbound),
        ] {
            let found = direction(&[listener], v4, "198.51.100.7:443", RANGE);
            assert_eq!(found, expected_v4, "{listener} {v4}");
            let found = direction(&[listener], v6, "[2001:db8:1::2]:443", RANGE);
            assert_eq!(found, expected_v6, "{listener} {v6}");
        }
    }

    #[test]
    fn two_ephemeral_ports_give_no_direction() {
        use Direction::*;
        for (local, remote, range, expected) in [
            (40_000, 443, RANGE, Outbound),
            (40_000, 50_000, RANGE, Unknown),
            (443, 50_000, RANGE, Unknown),
            (443, 444, RANGE, Unknown),
            // Of a remote host the range is not known.
            (40_000, 61_500, RANGE, Unknown),
            (45_001, 33_000, (45_001, 45_001), Unknown),
            (44_000, 443, (45_001, 45_001), Unknown),
            // A wide range: whoever is above 32,767 is the client.
            (40_000, 8_080, (1_024, 65_535), Outbound),
            (8_080, 40_000, (1_024, 65_535), Unknown),
            (8_080, 15_000, (1_024, 65_535), Unknown),
            (8_080, 443, (1_024, 65_535), Outbound),
        ] {
            let (local, remote) = (
                format!("10.0.0.1:{local}"),
                format!("198.51.100.7:{remote}"),
            );
            assert_eq!(
                direction(&[], &local, &remote, range),
                expected,
                "{local} {remote} {range:?}"
            );
        }
    }

    #[test]
    fn the_client_of_a_listener_here_is_outbound() {
        let at = |listener: &str, local, remote| direction(&[listener], local, remote, RANGE);
        let client = ("127.0.0.1:50000", "127.0.0.1:40000");
        assert_eq!(at("0.0.0.0:40000", client.0, client.1), Direction::Outbound);
        assert_eq!(at("10.0.0.9:40000", client.0, client.1), Direction::Unknown);
        let client = ("10.0.0.8:50000", "10.0.0.9:40000");
        assert_eq!(
            at("10.0.0.9:40000", client.0, client.1),
            Direction::Outbound
        );
        // A wildcard here is not one of another host.
        assert_eq!(at("0.0.0.0:40000", client.0, client.1), Direction::Unknown);
    }

    #[test]
    fn listeners_beyond_the_bound_count_by_port() {
        let mut listening = Listening::default();
        for n in 0..=ADDRESSES_MAX as u32 {
            listening.insert(IpAddr::from((0x0a00_0000 + n).to_be_bytes()), 80);
        }
        assert_eq!(listening.addresses.len(), ADDRESSES_MAX);
        assert!(listening.accepts([192, 0, 2, 1].into(), 80));
        listening.clear();
        assert!(!listening.accepts([10, 0, 0, 0].into(), 80));
    }
}
