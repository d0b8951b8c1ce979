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
mod time;
pub mod top;
pub mod trace;

use connmon_host::kernel::TracerOptions;
use connmon_host::reconcile::netns::Roots;

use crate::config::Config;

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
