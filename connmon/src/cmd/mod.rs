//! The commands beside `run`. Each writes to stdout with `writeln!` and
//! passes write errors on, so that a closed pipe ends it quietly; `check`
//! ends with its verdict even then.

pub mod check;
mod columns;
mod connection;
mod containers;
mod follow;
pub mod list;
mod samples;
mod snapshot;
mod stop;
mod terminal;
pub mod top;
pub mod trace;

use std::io::Write;

use connmon_host::kernel::TracerOptions;
use connmon_host::reconcile::netns::Roots;
use serde::Serialize;

use crate::config::Config;

/// Prints a value as one line of JSON.
fn print_json(out: &mut impl Write, value: &impl Serialize) -> std::io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    writeln!(out)
}

/// How the tools trace: as the agent would, with every owner.
///
/// # Errors
/// Without a readable `/proc/self/ns/net`, where one namespace is watched.
fn tracer_options(config: &Config) -> std::io::Result<TracerOptions> {
    let only_netns = match config.all_netns {
        true => None,
        false => Some(Roots::default().host()?),
    };
    Ok(TracerOptions {
        attach: config.attach,
        ring_buffer_bytes: config.ring_buffer_bytes,
        drop_loopback: config.exclude_loopback,
        only_netns,
        owners: true,
        traffic: true,
        log_level: config.log_level,
    })
}
