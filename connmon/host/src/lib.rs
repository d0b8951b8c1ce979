//! The host side of connmon, and the only place with `unsafe`: BPF programs
//! and their ring buffer ([`kernel`]), the kernel's socket tables
//! ([`reconcile`]), and what each thread may still do ([`sandbox`]).

mod exhaustion;
pub mod kernel;
pub mod reconcile;
pub mod sandbox;

pub use exhaustion::is_resource_exhausted;
