//! The state scenarios on the running kernel, rung by rung: each asserted
//! event by event through a tracer of its own, and in the metrics of a
//! running agent. `cargo test` runs it on this machine's kernel for the rungs
//! that the kernel allows; `cargo xtask vm` runs the same binary in guests,
//! where every rung must attach. A test's name is `RUNG::SCENARIO`.

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
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use scenarios::Scenario;
use world::{Outcome, Rung, TRIES, World};

/// What the harness asks of the main thread, which alone is in the network
/// namespace and holds the [`World`].
struct Request {
    rung: Rung,
    name: String,
    /// `None` ends the agent of this rung, which must exit cleanly.
    scenario: Option<Scenario>,
    answer: SyncSender<Result<Completion, Failed>>,
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(host::WITHOUT_FIRST_THREAD) {
        host::without_first_thread();
    }
    let mut args = Arguments::from_args();
    if !rustix::process::geteuid().is_root() {
        support::skipped("state scenarios", "need root");
        return ExitCode::SUCCESS;
    }
    args.test_threads = Some(1);
    let (requests, asked) = sync_channel(0);
    let trials = trials(&mut args, &requests);
    drop(requests);
    if args.list {
        return libtest_mimic::run(&args, trials).exit_code();
    }
    let conclusion = thread::scope(|scope| {
        let harness = scope.spawn(|| libtest_mimic::run(&args, trials));
        serve(&asked);
        harness.join()
    });
    conclusion
        .expect("the harness catches every panic")
        .exit_code()
}

/// The scenarios of every rung that the arguments select, and after those of
/// a rung the end of its agent. A filter is one part of a name or several
/// between commas.
fn trials(args: &mut Arguments, requests: &SyncSender<Request>) -> Vec<Trial> {
    let filter = args.filter.take();
    let exact = std::mem::take(&mut args.exact);
    let selected = |name: &str| {
        let mut parts = filter.iter().flat_map(|filter| filter.split(','));
        filter.is_none() || parts.any(|part| name == part || !exact && name.contains(part))
    };
    let mut trials = Vec::new();
    for rung in rungs() {
        let named = |scenario: &str| format!("{}::{scenario}", rung.name());
        let before = trials.len();
        for &(name, on, scenario) in scenarios::ALL {
            if on.includes(rung) && selected(&named(name)) {
                trials.push(trial(rung, named(name), Some(scenario), requests));
            }
        }
        if trials.len() > before {
            trials.push(trial(rung, named("end"), None, requests));
        }
    }
    trials
}

/// Those of `CONNMON_RUNGS`, which names them between commas.
fn rungs() -> Vec<Rung> {
    match std::env::var("CONNMON_RUNGS") {
        Ok(names) => names
            .split(',')
            .map(|name| Rung::from_name(name).unwrap_or_else(|| panic!("no rung {name}")))
            .collect(),
        Err(_) => vec![Rung::Auto, Rung::Tracepoint, Rung::Proc],
    }
}

fn trial(
    rung: Rung,
    name: String,
    scenario: Option<Scenario>,
    requests: &SyncSender<Request>,
) -> Trial {
    let requests = requests.clone();
    Trial::ignorable_test(name.clone(), move || {
        let (answer, answered) = sync_channel(1);
        requests.send(Request {
            rung,
            name,
            scenario,
            answer,
        })?;
        answered.recv()?
    })
}

/// Answers every request; the world of a rung lasts from its first scenario
/// to its end.
fn serve(asked: &Receiver<Request>) {
    let network = network::Network::enter();
    let mut world: Option<Result<World<'_>, String>> = None;
    for request in asked {
        let ready = world.get_or_insert_with(|| {
            caught(|| World::new(request.rung, &network)).unwrap_or_else(Err)
        });
        let done = match (ready, request.scenario) {
            (Ok(world), Some(scenario)) => run(world, &request.name, scenario),
            (Err(reason), Some(_)) => {
                Err(format!("{} does not attach: {reason}", request.rung.name()).into())
            }
            (_, None) => match world.take() {
                Some(Ok(world)) => caught(|| world.end())
                    .map(|()| Completion::Completed)
                    .map_err(Failed::from),
                _ => Ok(Completion::ignored()),
            },
        };
        // The harness waits for it.
        let _ = request.answer.send(done);
    }
}

/// Runs one scenario. One that failed while the kernel left out runs of the
/// programs is retried, see [`World::excuse`], which a line `retried: …`
/// reports.
fn run(world: &mut World<'_>, name: &str, scenario: Scenario) -> Result<Completion, Failed> {
    let mut excused = Vec::new();
    loop {
        let tries = excused.len() + 1;
        let outcome = caught(|| {
            world.begin();
            let outcome = scenario(world);
            world.check_laws();
            outcome
        });
        match outcome {
            Ok(outcome) => {
                if !excused.is_empty() {
                    println!("retried: {name}: {}", excused.join("; "));
                }
                return Ok(match outcome {
                    Outcome::Held => Completion::Completed,
                    Outcome::NotApplicable(reason) => {
                        println!("not applicable: {name}: {reason}");
                        Completion::ignored_with(reason)
                    }
                });
            }
            Err(message) => {
                let excuse = caught(|| world.excuse(tries));
                match excuse {
                    Ok(Some(excuse)) if tries < TRIES => {
                        excused.push(format!("{excuse}: {message}"));
                    }
                    _ if excused.is_empty() => return Err(message.into()),
                    _ => return Err(format!("{message}; before: {}", excused.join("; ")).into()),
                }
            }
        }
    }
}

/// What `work` returns, or the message of its panic on one line.
fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| message(panic.as_ref()))
}

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
