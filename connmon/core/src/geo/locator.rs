//! [`Locate`] over one database, with a cache keyed on the record.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::{Country, Database, Locate};

/// Slots of the cache, a power of two. A country database has a few hundred
/// distinct records, a city database some hundred thousand, of which few are
/// in use at a time.
const SLOTS: usize = 4_096;

/// Answers for one database. Another database needs another locator, so no
/// answer ever mixes two.
#[derive(Debug)]
pub struct Locator {
    database: Arc<Database>,
    /// Direct-mapped: (record offset, its country). Addresses are not keys:
    /// many share a record, and decoding one costs several times the lookup.
    cache: Box<[(usize, Country)]>,
}

impl Locator {
    /// A locator with an empty cache.
    pub fn new(database: Arc<Database>) -> Self {
        Self {
            database,
            cache: vec![(NO_RECORD, Country::UNKNOWN); SLOTS].into_boxed_slice(),
        }
    }

    /// The database behind it.
    pub fn database(&self) -> &Arc<Database> {
        &self.database
    }

    /// A record that lies within a special range is its owner's word on his
    /// own network (sites, say, or a test's hosts) and counts; one that merely
    /// spans the range does not.
    fn place(&mut self, address: IpAddr, special: Option<Special>) -> Country {
        let Some(special) = special else {
            return self.look_up(address);
        };
        if self.database.prefix(address) < Some(special.prefix) {
            return special.country;
        }
        let found = self.look_up(address);
        if found.is_public() {
            found
        } else {
            special.country
        }
    }

    fn look_up(&mut self, address: IpAddr) -> Country {
        let Some((offset, record)) = self.database.record(address) else {
            return Country::UNKNOWN;
        };
        let slot = &mut self.cache[slot(offset)];
        if slot.0 != offset {
            *slot = (offset, record.country());
        }
        slot.1
    }
}

impl Locate for Locator {
    fn country(&mut self, address: IpAddr) -> Country {
        match address {
            IpAddr::V4(v4) => self.place(address, special_v4(v4)),
            IpAddr::V6(v6) => match embedded_v4(v6) {
                Some(v4) => self.country(v4.into()),
                None => self.place(address, special_v6(v6)),
            },
        }
    }
}

/// No record starts there: a record needs at least one byte after its offset.
const NO_RECORD: usize = usize::MAX;

/// Fibonacci hashing: the high bits of the product spread neighbours.
fn slot(offset: usize) -> usize {
    let product = (offset as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (product >> (u64::BITS - SLOTS.ilog2())) as usize
}

/// A range that is no country's.
#[derive(Clone, Copy, Debug)]
struct Special {
    country: Country,
    prefix: u8,
}

fn special_v4(address: Ipv4Addr) -> Option<Special> {
    use Country as C;
    let octets = address.octets();
    let (country, prefix) = match octets {
        [127, ..] => (C::LOOPBACK, 8),
        [10, ..] => (C::PRIVATE, 8),
        [172, second, ..] if second & 0xf0 == 16 => (C::PRIVATE, 12),
        [192, 168, ..] | [169, 254, ..] => (C::PRIVATE, 16),
        // RFC 6598
        [100, second, ..] if second & 0xc0 == 64 => (C::PRIVATE, 10),
        _ => return None,
    };
    Some(Special { country, prefix })
}

fn special_v6(address: Ipv6Addr) -> Option<Special> {
    let (country, prefix) = if address.is_loopback() {
        (Country::LOOPBACK, 128)
    } else if address.is_unique_local() {
        (Country::PRIVATE, 7)
    } else if address.is_unicast_link_local() {
        (Country::PRIVATE, 10)
    } else {
        return None;
    };
    Some(Special { country, prefix })
}

/// The IPv4 address inside `::ffff:0:0/96` (RFC 4291) and `64:ff9b::/96`
/// (RFC 6052).
pub(crate) fn embedded_v4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    match address.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)))
        }
        _ => address.to_ipv4_mapped(),
    }
}
