//! `cargo xtask`: builds, runs, tests, measures and packs connmon, one module
//! a subcommand.

#![forbid(unsafe_code)]

mod bench;
mod build_ebpf;
mod cross;
mod database;
mod demo;
mod dist;
mod exec;
mod fuzz;
mod install;
mod lint;
mod report;
mod run;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Build, run and test connmon.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Rebuild the committed BPF objects, or check them
    BuildEbpf(build_ebpf::Args),
    /// Store equal parts of the country database's tree once
    ShrinkDatabase(database::Args),
    /// Build the agent and run it on this machine
    Run(run::Args),
    /// The part of `run --demo` that needs root
    #[command(hide = true)]
    Demo(run::DemoArgs),
    /// Run every test, installing what they need when root on Debian
    Test(test::Args),
    /// Build package, tarball, container root, SBOM and checksums
    Dist(dist::Args),
    /// Measure against the bounds and beside others; writes BENCHMARKS.md
    Bench(bench::Args),
    /// A part of `bench` in a process of its own
    #[command(hide = true)]
    BenchTool(bench::tool::Args),
    /// Run the kernel tests on other kernels, in guests
    Vm(vm::Args),
    /// Run the fuzz targets, a minute each
    Fuzz(fuzz::Args),
    /// Check format, lints, docs, supply chain, and the build for aarch64
    Lint,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::BuildEbpf(args) => build_ebpf::run(&args),
        Task::ShrinkDatabase(args) => database::run(&args),
        Task::Run(args) => run::run(args),
        Task::Demo(args) => run::run_demo(&args),
        Task::Test(args) => test::run(&args),
        Task::Dist(args) => dist::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::BenchTool(args) => bench::tool::run(&args),
        Task::Vm(args) => vm::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Lint => lint::run(),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
