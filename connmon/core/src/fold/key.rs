//! The endpoints of a connection in 16 bytes, and keyed hashes over them.

use std::hash::Hasher as _;
use std::net::IpAddr;

use siphasher::sip128::{Hasher128 as _, SipHasher13};

use crate::event::{NetnsId, SocketId, Tuple};

/// Endpoints and namespace. IPv4 endpoints are exact (`a`: both addresses,
/// `b`: both ports). IPv6 endpoints are a 96-bit keyed hash: two of a million
/// connections collide with a probability below 1e-16, and nobody without the
/// key can provoke it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Key {
    pub(super) a: u64,
    pub(super) b: u32,
    /// Namespace inode; 0 if it is not known.
    pub(super) netns: NetnsId,
}

impl Key {
    /// Same endpoints, and the same namespace if both are known.
    pub(super) fn matches(&self, other: &Self) -> bool {
        (self.a, self.b) == (other.a, other.b)
            && (self.netns == other.netns || self.netns == 0 || other.netns == 0)
    }
}

/// Makes and hashes keys with per-process secrets.
#[derive(Clone, Debug)]
pub(super) struct Hasher {
    secret: [u64; 4],
    sip: SipHasher13,
}

impl Hasher {
    pub(super) fn new(key: &[u8; 16]) -> Self {
        let sip = SipHasher13::new_with_key(key);
        let mut secret = [0; 4];
        for (pair, index) in secret.as_chunks_mut().0.iter_mut().zip(0u8..) {
            let mut hasher = sip;
            hasher.write_u8(index);
            let hash = hasher.finish128();
            *pair = [hash.h1 | 1, hash.h2 | 1];
        }
        Self { secret, sip }
    }

    /// The key of both endpoints.
    pub(super) fn key(&self, tuple: &Tuple, netns: NetnsId) -> Key {
        let ports = u32::from(tuple.local_port) << 16 | u32::from(tuple.remote_port);
        match (tuple.local, tuple.remote) {
            (IpAddr::V4(local), IpAddr::V4(remote)) => Key {
                a: u64::from(u32::from(local)) << 32 | u64::from(u32::from(remote)),
                b: ports,
                netns,
            },
            (local, remote) => {
                let mut hasher = self.sip;
                let mut bytes = [0; 36];
                bytes[..16].copy_from_slice(&v6_octets(local));
                bytes[16..32].copy_from_slice(&v6_octets(remote));
                bytes[32..].copy_from_slice(&ports.to_ne_bytes());
                hasher.write(&bytes);
                let hash = hasher.finish128();
                Key {
                    a: hash.h1,
                    b: hash.h2 as u32,
                    netns,
                }
            }
        }
    }

    /// The key of the remote endpoint, for an active open whose local port is
    /// not known yet.
    pub(super) fn remote_key(&self, tuple: &Tuple, netns: NetnsId) -> Key {
        let b = u32::from(tuple.remote_port);
        let a = match tuple.remote {
            IpAddr::V4(remote) => u64::from(u32::from(remote)),
            IpAddr::V6(remote) => {
                let (low, high) = (remote.to_bits() as u64, (remote.to_bits() >> 64) as u64);
                folded_multiply(low ^ self.secret[0], high ^ self.secret[1])
            }
        };
        Key { a, b, netns }
    }

    /// Hash of a socket's kernel address.
    pub(super) fn hash_id(&self, id: SocketId) -> u64 {
        folded_multiply(id ^ self.secret[0], self.secret[1])
    }

    /// Hash of a key, without the namespace: that may be unknown in one of two
    /// keys that match.
    pub(super) fn hash_key(&self, key: &Key) -> u64 {
        folded_multiply(key.a ^ self.secret[2], u64::from(key.b) ^ self.secret[3])
    }
}

fn v6_octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// The 128-bit product, its halves folded together: one multiplication, every
/// input bit reaches every output bit (the finaliser of foldhash and wyhash).
fn folded_multiply(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(local: &str, remote: &str) -> Tuple {
        let local: std::net::SocketAddr = local.parse().unwrap();
        let remote: std::net::SocketAddr = remote.parse().unwrap();
        Tuple {
            local: local.ip(),
            local_port: local.port(),
            remote: remote.ip(),
            remote_port: remote.port(),
        }
    }

    #[test]
    fn every_part_of_the_endpoints_counts() {
        let hasher = Hasher::new(&[7; 16]);
        let texts = [
            ("10.0.0.1:80", "10.0.0.2:1000"),
            ("10.0.0.1:81", "10.0.0.2:1000"),
            ("10.0.0.1:80", "10.0.0.2:1001"),
            ("10.0.0.3:80", "10.0.0.2:1000"),
            ("10.0.0.1:80", "10.0.0.4:1000"),
            ("10.0.0.2:1000", "10.0.0.1:80"),
            ("[::1]:80", "[2001:db8::1]:1000"),
            ("[::1]:81", "[2001:db8::1]:1000"),
            ("[::1]:80", "[2001:db8::2]:1000"),
            ("[::2]:80", "[2001:db8::1]:1000"),
            ("[2001:db8::1]:1000", "[::1]:80"),
        ];
        let keys: Vec<Key> = texts
            .iter()
            .map(|(local, remote)| hasher.key(&tuple(local, remote), 1))
            .collect();
        for (i, a) in keys.iter().enumerate() {
            for (j, b) in keys.iter().enumerate() {
                assert_eq!(a.matches(b), i == j, "{:?} {:?}", texts[i], texts[j]);
            }
        }
    }

    #[test]
    fn an_unknown_namespace_matches_every_one() {
        let hasher = Hasher::new(&[7; 16]);
        let tuple = tuple("10.0.0.1:80", "10.0.0.2:1000");
        let [unknown, one, two] = [0, 1, 2].map(|netns| hasher.key(&tuple, netns));
        assert!(unknown.matches(&one) && two.matches(&unknown) && !one.matches(&two));
        assert_eq!(hasher.hash_key(&unknown), hasher.hash_key(&one));
    }

    #[test]
    fn another_secret_gives_other_hashes() {
        let tuple = tuple("[::1]:80", "[2001:db8::1]:1000");
        let [one, two] = [[1; 16], [2; 16]].map(|key| Hasher::new(&key));
        assert_ne!(one.key(&tuple, 1), two.key(&tuple, 1));
        assert_ne!(
            one.hash_id(0xffff_8880_0000_1000),
            two.hash_id(0xffff_8880_0000_1000)
        );
    }
}
