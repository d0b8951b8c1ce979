//! Which connections are not counted, by the same rule for events, seeds and
//! polls. As for the country, an IPv6 address with an embedded IPv4 address
//! (64:ff9b::/96, NAT64) counts as that IPv4 address.

use std::net::IpAddr;

use super::{Network, RemoteFilter};
use crate::event::Tuple;
use crate::geo::embedded_v4;

/// Why a connection is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hidden {
    /// `--filter.loopback exclude`.
    Loopback,
    /// `--filter.exclude`.
    Excluded,
}

/// A [`RemoteFilter`] with its masks.
#[derive(Debug)]
pub struct Filter {
    exclude_loopback: bool,
    /// IPv4 or not, network, mask.
    networks: Vec<(bool, u128, u128)>,
}

impl Filter {
    /// Computes the masks.
    pub fn new(filter: &RemoteFilter) -> Self {
        let masked = |&Network { address, prefix }: &Network| {
            let (is_v4, bits) = left_aligned(address);
            let shift = 128u32.saturating_sub(prefix.into());
            let mask = u128::MAX.checked_shl(shift).unwrap_or(0);
            (is_v4, bits & mask, mask)
        };
        Self {
            exclude_loopback: filter.exclude_loopback,
            networks: filter.exclude.iter().map(masked).collect(),
        }
    }

    /// Why a connection is not counted; `None` if it is.
    pub fn hides(&self, tuple: &Tuple) -> Option<Hidden> {
        if self.exclude_loopback && is_loopback(tuple) {
            return Some(Hidden::Loopback);
        }
        let contain = |address| {
            let (is_v4, bits) = left_aligned(address);
            self.networks
                .iter()
                .any(|&(v4, net, mask)| v4 == is_v4 && bits & mask == net)
        };
        let excluded = contain(tuple.remote)
            || embedded_v4(tuple.remote).is_some_and(|remote| contain(remote.into()));
        excluded.then_some(Hidden::Excluded)
    }

    /// Whether no connection to a listener on `address` is counted.
    pub(super) fn hides_listener(&self, address: IpAddr) -> bool {
        self.exclude_loopback && address.to_canonical().is_loopback()
    }
}

/// Whether it is IPv4, and the address in the highest bits.
fn left_aligned(address: IpAddr) -> (bool, u128) {
    match address {
        IpAddr::V4(address) => (true, u128::from(address.to_bits()) << 96),
        IpAddr::V6(address) => (false, address.to_bits()),
    }
}

/// 127.0.0.0/8, ::1, or local address = remote address.
pub(super) fn is_loopback(tuple: &Tuple) -> bool {
    tuple.local == tuple.remote
        || tuple.remote.is_loopback()
        || embedded_v4(tuple.remote).is_some_and(|remote| remote.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hides(filter: &Filter, local: &str, remote: &str) -> Option<Hidden> {
        filter.hides(&Tuple {
            local: local.parse().unwrap(),
            local_port: 1,
            remote: remote.parse().unwrap(),
            remote_port: 2,
        })
    }

    #[test]
    fn loopback_is_three_things() {
        let filter = Filter::new(&RemoteFilter {
            exclude_loopback: true,
            exclude: Vec::new(),
        });
        let hidden = Some(Hidden::Loopback);
        assert_eq!(hides(&filter, "127.0.0.1", "127.9.9.9"), hidden);
        assert_eq!(hides(&filter, "::1", "::1"), hidden);
        assert_eq!(hides(&filter, "10.0.0.1", "10.0.0.1"), hidden);
        assert_eq!(
            hides(&filter, "::ffff:127.0.0.1", "::ffff:127.0.0.1"),
            hidden
        );
        assert_eq!(hides(&filter, "::2", "64:ff9b::127.0.0.1"), hidden);
        assert_eq!(hides(&filter, "::2", "64:ff9b::10.0.0.1"), None);
        assert_eq!(hides(&filter, "10.0.0.1", "10.0.0.2"), None);
        assert!(filter.hides_listener("127.0.0.53".parse().unwrap()));
        assert!(!filter.hides_listener("0.0.0.0".parse().unwrap()));
        let open = Filter::new(&RemoteFilter::default());
        assert_eq!(hides(&open, "::1", "::1"), None);
    }

    #[test]
    fn networks_by_prefix_zero_and_full_included() {
        let network = |text: &str, prefix| Network {
            address: text.parse().unwrap(),
            prefix,
        };
        let filter = Filter::new(&RemoteFilter {
            exclude_loopback: false,
            exclude: vec![
                network("192.0.2.0", 24),
                network("198.51.100.7", 32),
                network("2001:db8::", 32),
            ],
        });
        let hidden = Some(Hidden::Excluded);
        assert_eq!(hides(&filter, "10.0.0.1", "192.0.2.255"), hidden);
        assert_eq!(hides(&filter, "10.0.0.1", "192.0.3.0"), None);
        assert_eq!(hides(&filter, "10.0.0.1", "198.51.100.7"), hidden);
        assert_eq!(hides(&filter, "10.0.0.1", "198.51.100.6"), None);
        assert_eq!(hides(&filter, "::2", "2001:db8:ffff::1"), hidden);
        assert_eq!(hides(&filter, "::2", "2001:db9::1"), None);
        assert_eq!(hides(&filter, "::2", "64:ff9b::192.0.2.255"), hidden);
        assert_eq!(hides(&filter, "::2", "64:ff9b::192.0.3.0"), None);
        assert_eq!(hides(&filter, "::2", "64:ff9b:1::192.0.2.255"), None);
        let nat64 = Filter::new(&RemoteFilter {
            exclude_loopback: false,
            exclude: vec![network("64:ff9b::", 96)],
        });
        assert_eq!(hides(&nat64, "::2", "64:ff9b::192.0.2.255"), hidden);
        assert_eq!(hides(&nat64, "10.0.0.1", "192.0.2.255"), None);
        let all = Filter::new(&RemoteFilter {
            exclude_loopback: false,
            exclude: vec![network("0.0.0.0", 0)],
        });
        assert_eq!(hides(&all, "10.0.0.1", "8.8.8.8"), hidden);
        assert_eq!(hides(&all, "::2", "2001:db8::1"), None);
    }
}
