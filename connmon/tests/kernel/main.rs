//! The state scenarios on the running kernel, rung by rung: each asserted
//! event by event through a tracer of its own, and in the metrics of a
//! running agent. `cargo test` runs it on this machine's kernel for the rungs
//! that it allows; `cargo xtask vm` runs the same binary in guests, where
//! every rung must be there.
//!
//! A scenario that failed while the kernel left out runs of the programs is
//! retried, see [`World::excuse`], which a line `retried: …` reports. Prints
//! `PASS|FAIL|NA <release> <rung> <scenario> …`.

mod accepts;
mod bytes;
#[path = "../agent/harness.rs"]
#[expect(
    dead_code,
    reason = "shared with the agent's tests, which use all of it"
)]
mod harness;
mod host;
mod lives;
mod network;
mod raw;
mod scenarios;
mod sockets;
#[path = "../support/mod.rs"]
mod support;
#[path = "../agent/traffic.rs"]
#[expect(
    dead_code,
    reason = "shared with the agent's tests, which use all of it"
)]
mod traffic;
mod world;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use world::{Outcome, Rung, TRIES, World};

/// What was typed; libtest's own flags are let pass.
struct Args {
    rungs: Vec<Rung>,
    filter: Option<String>,
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(host::WITHOUT_FIRST_THREAD) {
        host::without_first_thread();
    }
    let args = parse();
    if !rustix::process::geteuid().is_root() {
        support::skipped("state scenarios", "need root");
        return tally(0, 0);
    }
    // As libtest begins, for whoever counts.
    println!("\nrunning {} scenarios", scenarios::ALL.len());
    let network = network::Network::enter();
    let (mut passed, mut failed) = (0, 0);
    for rung in args.rungs {
        match World::new(rung, &network) {
            Ok(world) => {
                let (now_passed, now_failed) = run(world, args.filter.as_deref());
                passed += now_passed;
                failed += now_failed;
            }
            Err(reason) => {
                failed += 1;
                println!("FAIL {} {} attach {reason}", release(), rung.name());
            }
        }
    }
    drop(network);
    tally(passed, failed)
}

fn parse() -> Args {
    let mut rungs = Vec::new();
    let mut filter = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--rung" => {
                let name = args.next().expect("--rung takes a name");
                rungs.push(Rung::from_name(&name).expect("a rung"));
            }
            "--scenario" => filter = args.next(),
            flag if flag.starts_with('-') => {}
            name => filter = Some(name.to_owned()),
        }
    }
    if rungs.is_empty() {
        rungs = vec![Rung::Auto, Rung::Tracepoint, Rung::Proc];
    }
    Args { rungs, filter }
}

fn run(mut world: World<'_>, filter: Option<&str>) -> (u64, u64) {
    let (mut passed, mut failed) = (0, 0);
    let release = release();
    let rung = world.rung.name();
    let is_asked =
        |name: &str| filter.is_none_or(|filter| filter.split(',').any(|part| name.contains(part)));
    for &(name, on, scenario) in scenarios::ALL {
        if !on.includes(world.rung) || !is_asked(name) {
            continue;
        }
        let started = Instant::now();
        let mut excused = Vec::new();
        let came_to = loop {
            let tries = excused.len() + 1;
            let came_to = catch_unwind(AssertUnwindSafe(|| {
                world.begin();
                let outcome = scenario(&mut world);
                world.check_laws();
                outcome
            }));
            let Err(panic) = &came_to else {
                break came_to;
            };
            if tries == TRIES {
                break came_to;
            }
            let said = message(panic.as_ref());
            match catch_unwind(AssertUnwindSafe(|| world.excuse(tries))) {
                Ok(Some(excuse)) => excused.push(format!("{excuse}: {said}")),
                _ => break came_to,
            }
        };
        let took = started.elapsed().as_millis();
        let excused = excused.join("; ");
        match came_to {
            Ok(Outcome::Held) => {
                passed += 1;
                if !excused.is_empty() {
                    println!("retried: {release} {rung} {name}: {excused}");
                }
                println!("PASS {release} {rung} {name} {took} ms");
            }
            Ok(Outcome::NotApplicable(reason)) => {
                println!("NA {release} {rung} {name} {reason}");
                if !world::in_guest() {
                    println!("not applicable: {release} {rung} {name}: {reason}");
                }
            }
            Err(panic) => {
                failed += 1;
                let said = message(panic.as_ref());
                match excused.is_empty() {
                    true => println!("FAIL {release} {rung} {name} {said}"),
                    false => println!("FAIL {release} {rung} {name} {said}; before: {excused}"),
                }
            }
        }
    }
    if let Err(error) = catch_unwind(AssertUnwindSafe(|| world.end())) {
        failed += 1;
        println!("FAIL {release} {rung} end {}", message(error.as_ref()));
    } else {
        passed += 1;
        println!("PASS {release} {rung} end 0 ms");
    }
    (passed, failed)
}

/// What a panic said, on one line.
fn message(panic: &(dyn Any + Send)) -> String {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    message.lines().collect::<Vec<_>>().join(" | ")
}

fn release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// Ends as libtest does, for whoever counts.
fn tally(passed: u64, failed: u64) -> ExitCode {
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out"
    );
    ExitCode::from(u8::from(failed > 0))
}
