//! Costs of BPF programs by the kernel's own statistics, and results of
//! criterion.

use std::collections::HashMap;
use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::exec;

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Keeps `kernel.bpf_stats_enabled` on while it lives.
#[derive(Debug)]
pub struct Statistics(String);

impl Statistics {
    /// Switches it on.
    pub fn enable() -> Result<Self> {
        let before = fs::read_to_string(SWITCH).context(SWITCH)?;
        fs::write(SWITCH, "1").context(SWITCH)?;
        Ok(Self(before))
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        let _ = fs::write(SWITCH, self.0.trim());
    }
}

/// Run time and count of one loaded program.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Runs {
    id: u32,
    #[serde(default)]
    run_time_ns: u64,
    #[serde(default)]
    run_cnt: u64,
}

/// Every loaded program by id.
pub fn all() -> Result<HashMap<u32, Runs>> {
    let text = exec::output(Command::new("bpftool").args(["-j", "prog", "show"]))?;
    let programs: Vec<Runs> = serde_json::from_str(&text).context("bpftool -j prog show")?;
    Ok(programs
        .into_iter()
        .map(|program| (program.id, program))
        .collect())
}

/// What a contender's programs cost, in nanoseconds, the reading of the clock
/// that measures it included once for each run.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// All of them together, for each run of the one that ran most.
    pub hit: f64,
    /// The mean of their runs.
    pub run: f64,
}

/// Of the programs that were not there `before`, between `start` and `end`.
pub fn cost(
    before: &HashMap<u32, Runs>,
    start: &HashMap<u32, Runs>,
    end: &HashMap<u32, Runs>,
) -> Option<Cost> {
    let (mut time, mut runs, mut hits) = (0, 0, 0);
    for (id, last) in end.iter().filter(|(id, _)| !before.contains_key(id)) {
        let first = start.get(id).copied().unwrap_or_default();
        time += last.run_time_ns.saturating_sub(first.run_time_ns);
        let here = last.run_cnt.saturating_sub(first.run_cnt);
        runs += here;
        hits = hits.max(here);
    }
    (hits > 1000).then(|| Cost {
        hit: time as f64 / hits as f64,
        run: time as f64 / runs as f64,
    })
}

/// (what, directory under target/criterion, bound in elements per second).
pub const CRITERION: [(&str, &str, f64); 4] = [
    (
        "events folded per core, 100k connections, IPv4",
        "fold_events/100k connections, IPv4",
        5e6,
    ),
    (
        "events folded per core, 100k connections, IPv6",
        "fold_events/100k connections, IPv6",
        5e6,
    ),
    (
        "events folded per core, 1M connections, IPv4",
        "fold_events/1M connections, IPv4",
        2.5e6,
    ),
    (
        "events folded per core, 1M connections, IPv6",
        "fold_events/1M connections, IPv6",
        2.5e6,
    ),
];

/// Elements per second of a criterion benchmark's last run.
pub fn criterion_rate(id: &str) -> Result<f64> {
    let dir = exec::target_dir().join("criterion").join(id).join("new");
    let number = |file: &str, pointer: &str| -> Result<f64> {
        let path = dir.join(file);
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let value: serde_json::Value = serde_json::from_slice(&text)?;
        let number = value.pointer(pointer).and_then(serde_json::Value::as_f64);
        number.with_context(|| format!("{} has no {pointer}", path.display()))
    };
    let nanoseconds = number("estimates.json", "/median/point_estimate")?;
    Ok(number("benchmark.json", "/throughput/Elements")? / (nanoseconds / 1e9))
}
