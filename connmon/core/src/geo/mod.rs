//! Address → country. A database is the bytes of a file that the caller reads.
//!
//! Private and loopback addresses are `private` and `loopback`, unless the
//! database gives them a country. No public database does, but one for a
//! private network can.

mod country;
mod database;
mod locator;

pub use country::Country;
pub use database::{Database, InvalidDatabase};
pub use locator::Locator;
pub(crate) use locator::embedded_v4;

use std::net::IpAddr;

/// Finds the country of an address.
pub trait Locate {
    /// The country of a remote address; `&mut` for a cache. The caller decides
    /// whether a connection between equal addresses is `loopback`.
    fn country(&mut self, address: IpAddr) -> Country;
}
