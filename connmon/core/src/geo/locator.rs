//! [`Locate`] over one database, with a cache by record.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use super::{Country, Database, Locate};

/// Slots of the cache, a power of two. A country database has a few hundred
/// distinct records, a city database some hundred thousand, of which few are
/// in use at a time.
const SLOTS: usize = 4_096;

/// Looks addresses up in one database. For another database, make another
/// locator.
#[derive(Debug)]
pub struct Locator {
    database: Arc<Database>,
    /// Direct-mapped: (record offset, its country). Many addresses share a
    /// record, and to decode one costs several times the lookup.
    cache: Box<[(usize, Country)]>,
}

impl Locator {
    /// A locator with an empty cache.
    pub fn new(database: Arc<Database>) -> Self {
        Self {
            database,
            // No record has the offset `usize::MAX`.
            cache: vec![(usize::MAX, Country::UNKNOWN); SLOTS].into(),
        }
    }

    /// Its database.
    pub fn database(&self) -> &Arc<Database> {
        &self.database
    }

    fn look_up(&mut self, address: IpAddr) -> Country {
        let Some((offset, record)) = self.database.record(address) else {
            return Country::UNKNOWN;
        };
        // Fibonacci hashing: the high bits of the product spread neighbours.
        let product = (offset as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let cached = &mut self.cache[(product >> (u64::BITS - SLOTS.ilog2())) as usize];
        if cached.0 != offset {
            *cached = (offset, record.country());
        }
        cached.1
    }
}

impl Locate for Locator {
    fn country(&mut self, address: IpAddr) -> Country {
        let address = embedded_v4(address).map_or(address, IpAddr::V4);
        let Some((special, prefix)) = special(address) else {
            return self.look_up(address);
        };
        // A record within the special range is about somebody's own network
        // (sites, or the hosts of a test) and counts, one that spans it not.
        if self.database.prefix(address) >= Some(prefix) {
            let found = self.look_up(address);
            if found.is_public() {
                return found;
            }
        }
        special
    }
}

/// The label of an address that belongs to no country, and the prefix length
/// of its range.
fn special(address: IpAddr) -> Option<(Country, u8)> {
    use Country as C;
    match address {
        IpAddr::V4(v4) => match v4.octets() {
            [127, ..] => Some((C::LOOPBACK, 8)),
            [10, ..] => Some((C::PRIVATE, 8)),
            [172, second, ..] if second & 0xf0 == 16 => Some((C::PRIVATE, 12)),
            [192, 168, ..] | [169, 254, ..] => Some((C::PRIVATE, 16)),
            // RFC 6598
            [100, second, ..] if second & 0xc0 == 64 => Some((C::PRIVATE, 10)),
            _ => None,
        },
        IpAddr::V6(v6) if v6.is_loopback() => Some((C::LOOPBACK, 128)),
        IpAddr::V6(v6) if v6.is_unique_local() => Some((C::PRIVATE, 7)),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some((C::PRIVATE, 10)),
        IpAddr::V6(_) => None,
    }
}

/// The IPv4 address in an IPv6 address of `::ffff:0:0/96` (RFC 4291) or
/// `64:ff9b::/96` (RFC 6052).
pub(crate) fn embedded_v4(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(v6) => match v6.segments() {
            [0x64, 0xff9b, 0, 0, 0, 0, _, _] => Some(Ipv4Addr::from_bits(v6.to_bits() as u32)),
            _ => v6.to_ipv4_mapped(),
        },
    }
}
