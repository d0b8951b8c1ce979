//! The kernel tests on other kernels: fetched, booted under QEMU's software
//! emulation, one line per kernel, rung and scenario.

mod fetch;
mod image;

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::exec;
use crate::tally::RETRIES;
use crate::tally::Tally;
use fetch::{KERNELS, Kernel, Unpacked};
use image::Payload;

/// At once; each guest has two processors, and with more guests than this
/// they wait for each other's locks.
const GUESTS: usize = 2;

/// Lines of a guest that wait to be read.
const LINES: usize = 1_024;

/// A guest that takes longer hangs.
const TIME: Duration = Duration::from_secs(900);

/// The kernel's command line. Each read of a namespace's sockets goes through
/// the whole hash of connections, which takes long under emulation at the size
/// that the kernel gives it.
const BOOT: &str = "console=ttyS0 panic=-1 quiet loglevel=2 thash_entries=1024";

/// Every way to trace or poll; each is forced in each guest.
const RUNGS: [&str; 4] = ["fentry", "kprobe", "tracepoint", "proc"];

/// What a kernel cannot have, and why. Anything else that a guest calls not
/// applicable has failed.
const EXPECTED: &[(&str, &str, &str)] = &[(
    "5.10",
    "mptcp",
    "Debian's cloud kernel 5.10 is built without MPTCP",
)];

/// `cargo xtask vm`.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Kernels to boot: 5.10, 6.1, 6.12, 7.2; all of them without this
    #[arg(long, value_delimiter = ',', num_args = 1..)]
    kernel: Vec<String>,
    /// A kernel image of your own (its modules are taken to be built in)
    #[arg(long, value_name = "PATH")]
    vmlinuz: Option<PathBuf>,
    /// Rungs to force: fentry, kprobe, tracepoint, proc; all without this
    #[arg(long, value_delimiter = ',', num_args = 1..)]
    rung: Vec<String>,
    /// Only scenarios whose name contains this, or one of these between commas
    #[arg(long)]
    scenario: Option<String>,
    /// On all kernels but the oldest, the highest rung only
    #[arg(long)]
    short: bool,
    /// Show all that the guests print
    #[arg(long)]
    verbose: bool,
}

impl Args {
    /// Every kernel and rung, or the short form.
    pub fn all(short: bool) -> Self {
        Self {
            short,
            ..Self::default()
        }
    }
}

/// A guest that can be packed and booted.
struct Guest {
    name: String,
    dir: PathBuf,
    kernel: Unpacked,
    payload: Payload,
}

/// What one boot came to.
#[derive(Debug, Default)]
struct Boot {
    tally: Tally,
    /// Rung, scenario and line of each that failed.
    failed: Vec<(String, String, String)>,
    /// Rung and scenario of each that passed.
    passed: Vec<(String, String)>,
    /// It ended before its work did.
    stopped: bool,
}

/// Boots and prints; the last line counts.
///
/// # Errors
/// When something cannot be built, packed or started.
pub fn run(args: &Args) -> Result<ExitCode> {
    let started = Instant::now();
    Ok(matrix(args)?.report(started))
}

/// Fetches, packs, boots, counts.
///
/// # Errors
/// As [`run`].
pub fn matrix(args: &Args) -> Result<Tally> {
    let mut tally = Tally::default();
    let dir = exec::target_dir().join("vm");
    std::fs::create_dir_all(&dir)?;
    for tool in [
        "qemu-system-x86_64",
        "busybox",
        "cpio",
        "ip",
        "ss",
        "tc",
        "nft",
        "strip",
    ] {
        if !exec::has(tool) {
            tally.skip(&format!("kernels in guests: {tool} is missing"));
            return Ok(tally);
        }
    }
    let (agent, test) = build()?;
    let rungs = if args.rung.is_empty() {
        RUNGS.map(Into::into).into()
    } else {
        args.rung.clone()
    };
    let runs: Vec<_> = (rungs.into_iter())
        .map(|rung| (rung, args.scenario.clone()))
        .collect();
    let mut guests = VecDeque::new();
    let kernels = kernels(args, &dir, &mut tally)?;
    for (at, (name, kernel)) in kernels.into_iter().enumerate() {
        let dir = dir.join(&name);
        std::fs::create_dir_all(&dir)?;
        let mut payload = Payload {
            agent: agent.clone(),
            test: test.clone(),
            runs: runs.clone(),
        };
        if args.short && at > 0 {
            let left = payload.runs.split_off(1);
            let left: Vec<_> = left.iter().map(|(rung, _)| rung.as_str()).collect();
            println!("not in the short form: {name} {}", left.join(", "));
        }
        guests.push_back(Guest {
            name,
            dir,
            kernel,
            payload,
        });
    }
    let guests = Mutex::new(guests);
    let booted = Mutex::new(Vec::new());
    let next = || guests.lock().ok().and_then(|mut guests| guests.pop_front());
    std::thread::scope(|scope| {
        for _ in 0..GUESTS {
            scope.spawn(|| {
                while let Some(guest) = next() {
                    let boot = guest.boot(args.verbose);
                    if let Ok(mut booted) = booted.lock() {
                        booted.push((guest, boot));
                    }
                }
            });
        }
    });
    let booted = booted
        .into_inner()
        .map_err(|_| anyhow::anyhow!("a guest's thread panicked"))?;
    for (guest, boot) in booted {
        let boot = boot?;
        tally.add(if boot.worth_another() {
            guest.retry(boot, args.verbose)?
        } else {
            boot.tally
        });
    }
    Ok(tally)
}

/// The kernels asked for; one that cannot be had is a skip.
fn kernels(args: &Args, dir: &Path, tally: &mut Tally) -> Result<Vec<(String, Unpacked)>> {
    if let Some(vmlinuz) = &args.vmlinuz {
        let unpacked = Unpacked {
            vmlinuz: vmlinuz.clone(),
            modules: None,
        };
        return Ok(vec![("own".into(), unpacked)]);
    }
    for asked in &args.kernel {
        if !KERNELS.iter().any(|kernel| kernel.name == asked) {
            bail!(
                "--kernel {asked}: there are {}",
                KERNELS.map(|kernel| kernel.name).join(", ")
            );
        }
    }
    let wanted =
        |kernel: &&Kernel| args.kernel.is_empty() || args.kernel.iter().any(|a| a == kernel.name);
    let mut fetched = Vec::new();
    for kernel in KERNELS.iter().filter(wanted) {
        match kernel.fetch(dir) {
            Ok(unpacked) => fetched.push((kernel.name.to_owned(), unpacked)),
            Err(error) => tally.skip(&format!("kernel {}: {error:#}", kernel.name)),
        }
    }
    Ok(fetched)
}

/// Builds the agent and its kernel tests as `cargo test` does, so that one
/// build serves both.
fn build() -> Result<(PathBuf, PathBuf)> {
    let mut command = exec::cargo();
    command.args([
        "test",
        "--no-run",
        "--locked",
        // One package alone would have other features, and be built anew.
        "--workspace",
        "--test=kernel",
        "--message-format=json-render-diagnostics",
    ]);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{}`", exec::shown(&command)))?;
    if !output.status.success() {
        bail!("`{}` failed: {}", exec::shown(&command), output.status);
    }
    let built = |name: &str, kind: &str| {
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|message| {
                message["target"]["name"] == name && message["target"]["kind"][0] == kind
            })
            .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
            .with_context(|| format!("cargo built no {kind} {name}"))
    };
    Ok((built("connmon", "bin")?, built("kernel", "test")?))
}

impl Guest {
    /// Boots to the end. A guest that stopped on its way, with nothing failed
    /// until then, is booted once more: an emulated kernel hangs now and then
    /// on a busy machine.
    fn boot(&self, verbose: bool) -> Result<Boot> {
        let first = self.boot_once(&self.payload, verbose)?;
        if !first.stopped || !first.failed.is_empty() {
            return Ok(first);
        }
        println!("retried: {}: the guest stopped on its way", self.name);
        let mut second = self.boot_once(&self.payload, verbose)?;
        second.tally.add_notes(first.interrupted());
        Ok(second)
    }

    /// Retries the few that failed, with no other guest beside it: under
    /// emulation a busy machine fails one in hundreds.
    fn retry(&self, first: Boot, verbose: bool) -> Result<Tally> {
        let runs = (first.failed.iter())
            .map(|(rung, scenario, _)| (rung.clone(), Some(scenario.clone())))
            .collect();
        println!("retried: {}: {runs:?}", self.name);
        let second = self.boot_once(&self.payload.with(runs), verbose)?;
        Ok(first.settle(second))
    }

    /// Failures of QEMU itself are failed lines.
    fn boot_once(&self, payload: &Payload, verbose: bool) -> Result<Boot> {
        let initrd = image::pack(&self.dir, &self.kernel, payload)
            .with_context(|| format!("packing for kernel {}", self.name))?;
        let mut boot = Boot::default();
        let mut tail = VecDeque::new();
        let mut done = 0;
        let mut ended = false;
        let ran = self.lines(&initrd, |line| {
            if verbose {
                println!("[{}] {line}", self.name);
            }
            if boot.line(&self.name, line) {
                return;
            }
            if line.starts_with("guest: rung ") {
                done += usize::from(line.ends_with(" exit 0") || line.ends_with(" exit 1"));
            }
            ended |= line == "guest: end";
            tail.push_back(line.to_owned());
            if tail.len() > 60 {
                tail.pop_front();
            }
        });
        let complete = ended && done == payload.runs.len();
        boot.stopped = ran.is_err() || !complete;
        if let Err(error) = &ran {
            boot.tally
                .fail(format!("FAIL {} - guest {error:#}", self.name));
        } else if !complete {
            boot.tally
                .fail(format!("FAIL {} - guest did not run every rung", self.name));
        }
        if !boot.tally.failed.is_empty() && !verbose {
            for line in tail {
                println!("[{}] {line}", self.name);
            }
        }
        Ok(boot)
    }

    /// Hands on what the guest prints on its serial line.
    fn lines(&self, initrd: &Path, mut each: impl FnMut(&str)) -> Result<()> {
        // What else runs goes first.
        let mut command = Command::new("nice");
        command
            .args(["-n", "19", "qemu-system-x86_64"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"])
            .args(["-m", "2048", "-nographic", "-no-reboot", "-nic", "none"])
            .arg("-kernel")
            .arg(&self.kernel.vmlinuz)
            .arg("-initrd")
            .arg(initrd)
            .args(["-append", BOOT]);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start `{}`", exec::shown(&command)))?;
        let output = child.stdout.take().context("piped")?;
        let (sender, receiver) = mpsc::sync_channel(LINES);
        std::thread::spawn(move || read_lines(output, &sender));
        let until = Instant::now() + TIME;
        let in_time = loop {
            match receiver.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => each(&line),
                Err(mpsc::RecvTimeoutError::Disconnected) => break true,
                Err(mpsc::RecvTimeoutError::Timeout) => break false,
            }
        };
        if !in_time {
            child.kill()?;
        }
        child.wait()?;
        if !in_time {
            bail!("did not end within {} s", TIME.as_secs());
        }
        Ok(())
    }
}

fn read_lines(output: impl Read, sender: &mpsc::SyncSender<String>) {
    for line in BufReader::new(output).split(b'\n') {
        let Ok(line) = line else { return };
        let line = String::from_utf8_lossy(&line);
        if sender.send(line.trim_end_matches('\r').to_owned()).is_err() {
            return;
        }
    }
}

impl Boot {
    /// Whether few enough failed, and the guest got to its end.
    fn worth_another(&self) -> bool {
        !self.stopped && (1..=RETRIES).contains(&self.failed.len())
    }

    /// What a boot that stopped on its way leaves for the summary, beside the
    /// counts of the second try.
    fn interrupted(mut self) -> Tally {
        let stopped = self.tally.failed.drain(..);
        let lines = stopped.map(|line| format!("retried: {line}"));
        self.tally.retried.extend(lines);
        self.tally
    }

    /// What it came to, given the second try of what failed.
    fn settle(self, second: Self) -> Tally {
        let mut tally = self.tally;
        for (rung, scenario, line) in self.failed {
            let mut again = second.failed.iter();
            if second.passed.contains(&(rung.clone(), scenario.clone())) {
                tally.failed.retain(|failed| *failed != line);
                tally.passed_when_retried(&line);
            } else if let Some((_, _, other)) =
                again.find(|(other, what, _)| (other, what) == (&rung, &scenario))
            {
                for failed in tally.failed.iter_mut().filter(|failed| **failed == line) {
                    *failed = format!("{line}; retried: {other}");
                }
            }
        }
        tally.add_notes(second.tally);
        tally
    }

    fn fail(&mut self, rung: &str, scenario: &str, line: String) {
        self.failed
            .push((rung.to_owned(), scenario.to_owned(), line.clone()));
        self.tally.fail(line);
    }

    /// Takes one line of a guest; whether it was a scenario's.
    fn line(&mut self, kernel: &str, line: &str) -> bool {
        // A guest lacks tools of the host, which is no skip. Not printed here,
        // where this file's own tests would print it for whoever counts their
        // output; the summary shows it.
        if line.starts_with("retried: ") || line.starts_with("inconclusive: ") {
            return self.tally.note(line);
        }
        let mut words = line.splitn(5, ' ');
        let (verdict, _release, rung, scenario) =
            (words.next(), words.next(), words.next(), words.next());
        let (Some(verdict), Some(rung), Some(scenario)) = (verdict, rung, scenario) else {
            return false;
        };
        let rest = words.next().unwrap_or_default();
        match verdict {
            "PASS" => {
                println!("{line}");
                self.tally.passed += 1;
                self.passed.push((rung.to_owned(), scenario.to_owned()));
            }
            "FAIL" => self.fail(rung, scenario, line.to_owned()),
            "NA" => {
                let expected = EXPECTED
                    .iter()
                    .find(|(k, s, _)| *k == kernel && *s == scenario);
                match expected {
                    Some((_, _, why)) => {
                        let line = format!("not applicable: {kernel} {rung} {scenario}: {why}");
                        println!("{line}");
                        self.tally.not_applicable.push(line);
                    }
                    None if kernel == "own" => println!("{line}"),
                    None => self.fail(
                        rung,
                        scenario,
                        format!(
                            "FAIL {kernel} {rung} {scenario} not expected to be missing here: {rest}"
                        ),
                    ),
                }
            }
            _ => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_a_guest_is_counted_once() {
        let mut boot = Boot::default();
        assert!(boot.line("5.10", "PASS 5.10.0-40 fentry fin-client 12 ms"));
        assert!(boot.line("5.10", "FAIL 5.10.0-40 fentry refused it was not"));
        assert!(boot.line("5.10", "NA 5.10.0-40 fentry mptcp protocol not supported"));
        assert!(boot.line("6.1", "NA 6.1.0-40 fentry mptcp protocol not supported"));
        assert!(!boot.line("6.1", "guest: end"));
        assert!(!boot.line("6.1", "skipped: a scrape: promtool: No such file"));
        assert!(!boot.line("6.1", "[    0.0] a kernel line that is long"));
        assert_eq!((boot.tally.passed, boot.tally.failed.len()), (1, 2));
        assert_eq!(boot.tally.not_applicable.len(), 1);
        assert_eq!(boot.tally.skipped.len(), 0);
        let failed: Vec<_> = (boot.failed.iter())
            .map(|(rung, scenario, _)| (rung.as_str(), scenario.as_str()))
            .collect();
        assert_eq!(failed, [("fentry", "refused"), ("fentry", "mptcp")]);
        assert!(boot.worth_another());
    }

    fn boot(lines: &[&str]) -> Boot {
        let mut boot = Boot::default();
        for line in lines {
            assert!(boot.line("6.1", line), "{line}");
        }
        boot
    }

    #[test]
    fn a_second_try_keeps_what_the_first_one_said() {
        let first = boot(&[
            "PASS 6.1.0-57 fentry fin-client 12 ms",
            "FAIL 6.1.0-57 fentry many a name with bytes after its NUL",
            "FAIL 6.1.0-57 fentry refused it was not",
            "inconclusive: 6.1.0-57 fentry bytes-live: no sample within 60 s",
        ]);
        let second = boot(&[
            "PASS 6.1.0-57 fentry many 30 ms",
            "FAIL 6.1.0-57 fentry refused something else",
        ]);
        let tally = first.settle(second);
        assert_eq!((tally.passed, tally.inconclusive.len()), (2, 1));
        assert_eq!(
            tally.retried,
            ["retried: FAIL 6.1.0-57 fentry many a name with bytes after its NUL"]
        );
        assert_eq!(
            tally.failed,
            ["FAIL 6.1.0-57 fentry refused it was not; retried: \
              FAIL 6.1.0-57 fentry refused something else"]
        );
    }

    #[test]
    fn a_guest_that_was_booted_twice_is_listed() {
        let mut stopped = boot(&["PASS 6.1.0-57 fentry fin-client 12 ms"]);
        stopped
            .tally
            .fail("FAIL 6.1 - guest did not run every rung".into());
        let mut tally = Tally::default();
        tally.add_notes(stopped.interrupted());
        assert_eq!((tally.passed, tally.failed.len()), (0, 0));
        assert_eq!(
            tally.retried,
            ["retried: FAIL 6.1 - guest did not run every rung"]
        );
    }
}
