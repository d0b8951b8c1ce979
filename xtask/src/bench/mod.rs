//! `cargo xtask bench`: what connmon costs, beside what others cost, in the
//! same minutes on the same machine.

mod process;
mod programs;
mod sections;
mod table;
pub mod tool;

use std::fs;
use std::process::ExitCode;

use anyhow::Result;

use crate::{exec, install};
use table::{Row, markdown};

/// `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Fewer rounds and shorter loads: three minutes instead of twenty
    #[arg(long)]
    quick: bool,
    /// Only these sections, by name
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

struct Bench {
    quick: bool,
    rows: Vec<Row>,
}

type Section = (&'static str, fn(&mut Bench) -> Result<()>);

const SECTIONS: [Section; 9] = [
    ("body", Bench::body),
    ("rate", Bench::rate),
    ("fold", Bench::fold),
    ("drops", Bench::drops),
    ("cpu", Bench::cpu),
    ("traffic", Bench::traffic),
    ("memory", Bench::memory),
    ("scrape", Bench::scrape),
    ("size", Bench::size),
];

/// Builds, measures, writes `target/bench.json`, and BENCHMARKS.md once that
/// has every section. A section that was not measured now keeps its rows.
///
/// # Errors
/// When a contender cannot be built or started.
pub fn run(args: &Args) -> Result<ExitCode> {
    anyhow::ensure!(exec::is_root(), "bench needs root: it attaches programs");
    install::contenders()?;
    exec::run(exec::cargo().args(["build", "--release", "--locked", "--package", "connmon"]))?;
    let json = exec::target_dir().join("bench.json");
    let earlier: Vec<Row> = (fs::read(&json).ok())
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    let mut rows = Vec::new();
    let mut missing = Vec::new();
    for (name, section) in SECTIONS {
        let first = rows.len();
        if !args.only.is_empty() && !args.only.iter().any(|only| only == name) {
            rows.extend(earlier.iter().filter(|row| row.section == name).cloned());
            if rows.len() == first {
                missing.push(name);
            }
            continue;
        }
        eprintln!("== {name}");
        let mut bench = Bench {
            quick: args.quick,
            rows: Vec::new(),
        };
        if let Err(error) = section(&mut bench) {
            // A contender that this machine cannot have must not hide the rest.
            bench
                .rows
                .push(Row::context(name, format!("not measured: {error:#}")));
        }
        eprint!("{}", markdown(&bench.rows));
        rows.extend(bench.rows.into_iter().map(|row| Row {
            section: name.to_owned(),
            ..row
        }));
    }
    fs::write(json, serde_json::to_vec_pretty(&rows)?)?;
    let document = document(args.quick, &rows)?;
    if missing.is_empty() {
        let path = exec::root().join("BENCHMARKS.md");
        // What people wrote about misses stays.
        let before = fs::read_to_string(&path).unwrap_or_default();
        let notes = before.find("\n## Misses").map_or("", |at| &before[at..]);
        fs::write(path, format!("{document}{notes}"))?;
        println!("wrote BENCHMARKS.md and target/bench.json");
    } else {
        println!(
            "{document}\nBENCHMARKS.md stays: never measured here: {}",
            missing.join(", ")
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn document(quick: bool, rows: &[Row]) -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1))
        .unwrap_or("unknown processor");
    let cpus = std::thread::available_parallelism()?;
    Ok(format!(
        "# Benchmarks\n\n\
         Written by `cargo xtask bench{}` as root on {cpus} virtual processors ({}), Linux {}. \
         The load is pinned to one processor and what is measured to the other; contenders take \
         turns in rounds, and ratios are medians of pairs within a round, so a machine that drifts \
         does not favour anybody. Absolute times are this machine's; ratios carry over. Misses stand \
         in bold.\n\n{}\n\
         How to repeat it: `cargo xtask bench` (half an hour) or `cargo xtask bench --quick` (some \
         minutes), as root on a quiet machine.\n",
        if quick { " --quick" } else { "" },
        model.trim(),
        release.trim(),
        markdown(rows),
    ))
}
