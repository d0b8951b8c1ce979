//! connmon: who is this machine talking to, by country and by port, right
//! now, and how sure are we?
//!
//! Data flows one way through the modules, in this order:
//! [`connmon_host::kernel`] (probes, ring buffer) → [`connmon_core::event`] (bytes → events) → [`connmon_core::fold`]
//! (events → state) → [`connmon_core::report`] → [`expose`] (state → text, JSON, page).
//! [`connmon_host::reconcile`] (the kernel's own tables) and [`connmon_core::geo`] (address → country)
//! feed the fold.

#![forbid(unsafe_code)]

pub mod agent;
pub mod cli;
pub mod cmd;
pub mod config;
pub mod database;
pub mod expose;
pub mod logging;
pub mod notify;
pub mod version;
