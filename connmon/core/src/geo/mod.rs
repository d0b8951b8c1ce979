//! Address → country. Pure: a database is the bytes of a file that the caller
//! has read.
//!
//! Private and loopback addresses are `private` and `loopback` unless the
//! database itself places them in a country, as one made for a private
//! network (or for a test) does; no public database does.

mod country;
mod database;
mod locator;

pub use country::Country;
pub use database::{Database, DatabaseSource, InvalidDatabase};
pub use locator::Locator;
pub(crate) use locator::embedded_v4;

use std::net::IpAddr;

/// What the fold asks of a country database.
pub trait Locate {
    /// The country of a remote address, by the contract's rules except for
    /// `loopback` by equal endpoints, which the caller decides. Takes `&mut`
    /// so that an implementation can keep a cache.
    fn country(&mut self, address: IpAddr) -> Country;
}
