//! The pure part of connmon: no clock, no file, no socket, no thread.
//!
//! Data flows through the modules in this order: [`event`] (bytes → events)
//! and [`scan`] (rows of the kernel's socket tables) → [`fold`] (state) →
//! [`report`]. [`geo`] gives the country of an address.
#![forbid(unsafe_code)]

pub mod event;
pub mod fold;
pub mod geo;
pub mod probe;
pub mod report;
pub mod scan;
pub mod text;
