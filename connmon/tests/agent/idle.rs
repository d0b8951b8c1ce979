//! A few events do not wake the agent: a timer bounds how long they wait.

use std::thread::sleep;
use std::time::Duration;

use crate::harness::{Agent, Scrape};
use crate::load::alone;
use crate::namespaces::{Namespace, may_run};
use crate::traffic::{Family, Server};

const SIGSTOP: i32 = 19;
const SIGCONT: i32 = 18;

/// What the README promises of an idle machine.
const LATEST: Duration = Duration::from_millis(100);

/// Connections of one burst, some 5 records of 40 to 80 bytes each: 8 fit into
/// a page, 16 do not.
const BURST: usize = 8;

/// Bursts of one round. The kernel side wakes the agent once in 128 records
/// of a CPU: however a round falls, it holds more than a ring between two of
/// these.
const BURSTS: usize = 16;

const ROUNDS: usize = 20;

fn counter(scrape: &Scrape, name: &str) -> f64 {
    scrape.sum(&format!("connmon_events_{name}_total"), &[])
}

/// Nothing reads the agent between the bursts of a round, and its ring of a
/// page does not hold two of them.
#[test]
fn an_event_is_folded_within_100_ms_without_scrapes() {
    if !may_run("the fold of an idle machine") {
        return;
    }
    let _alone = alone();
    // All that this agent sees, so that nobody else fills its ring.
    Namespace::new().run(|| {
        let mut args = vec!["--source", "ebpf", "--filter.loopback", "include"];
        args.extend(["--netns", "host", "--ebpf.ring-buffer-size", "4096"]);
        let agent = Agent::start(&args);
        let server = Server::new(Family::V4);
        let burst = || {
            server
                .pairs(BURST)
                .into_iter()
                .for_each(|pair| pair.reset())
        };
        let round = || {
            let before = agent.scrape();
            for _ in 0..BURSTS {
                burst();
                sleep(LATEST);
            }
            let after = agent.scrape();
            let rise = |name| counter(&after, name) - counter(&before, name);
            (rise("produced"), rise("dropped"))
        };
        // The agent may be starved in a round, but not in all of them.
        let lossless =
            (0..ROUNDS).find_map(|_| Some(round()).filter(|(_, dropped)| *dropped == 0.0));
        let (produced, _) = lossless.expect("a round without a loss");

        // Two bursts are too many for it, as one without an agent shows.
        agent.signal(SIGSTOP);
        burst();
        burst();
        agent.signal(SIGCONT);
        let lost = agent.until("the loss", |scrape| counter(scrape, "dropped") > 0.0);
        println!(
            "{produced} records in {BURSTS} bursts, {} of two bursts lost",
            counter(&lost, "dropped")
        );
        agent.stop();
    });
}
