//! connmon: who is this machine talking to, by country and by port, right
//! now, and how sure are we?
//!
//! Data flows one way through the modules, in this order:
//! [`kernel`] (probes, ring buffer) → [`event`] (bytes → events) → [`fold`]
//! (events → state) → [`report`] → [`expose`] (state → text, JSON, page).
//! [`reconcile`] (the kernel's own tables) and [`geo`] (address → country)
//! are side rooms of the fold.

pub mod agent;
pub mod cli;
pub mod cmd;
pub mod config;
pub mod event;
pub mod expose;
pub mod fold;
pub mod geo;
pub mod kernel;
pub mod logging;
pub mod notify;
pub mod read_file;
pub mod reconcile;
pub mod report;
pub mod sandbox;
mod shortage;
pub mod text;
pub mod version;
