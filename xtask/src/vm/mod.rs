//! `cargo xtask vm`: the kernel tests on other kernels, which are fetched and
//! booted under QEMU's software emulation.

mod fetch;
mod image;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::report::{self, Failure, Report, Results, Target};
use crate::{exec, test};
use fetch::{KERNELS, Kernel, Unpacked};

/// Guests at once. Each has two processors, and with more guests than this
/// they wait for each other's locks.
const GUESTS: usize = 2;

/// A guest that takes longer hangs.
const TIME: Duration = Duration::from_secs(900);

/// The kernel's command line. Each read of a namespace's sockets goes through
/// the whole hash of connections, which takes long under emulation at the size
/// that the kernel gives it.
const BOOT: &str = "console=ttyS0 panic=-1 quiet loglevel=2 thash_entries=1024";

/// Every way to trace or poll; each is forced in each guest.
const RUNGS: [&str; 4] = ["fentry", "kprobe", "tracepoint", "proc"];

/// Programs of the host without which there are no guests.
const TOOLS: [&str; 9] = [
    "qemu-system-x86_64",
    "busybox",
    "cpio",
    "depmod",
    "ip",
    "ss",
    "tc",
    "nft",
    "strip",
];

/// Kernel and scenario that cannot be. Anything else that a guest calls not
/// applicable has failed. Debian's cloud kernel 5.10 is built without MPTCP.
const EXPECTED: &[(&str, &str)] = &[("5.10", "mptcp")];

/// The name of a kernel that `--vmlinuz` gave.
const OWN: &str = "own";

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
pub struct Guest {
    /// `kernel-6.1`
    name: String,
    /// As [`Kernel::name`].
    kernel: String,
    unpacked: Unpacked,
    agent: PathBuf,
    test: PathBuf,
    rungs: Vec<String>,
    scenario: Option<String>,
    verbose: bool,
}

/// Boots and prints; the last line counts.
///
/// # Errors
/// When something cannot be built, packed or started.
pub fn run(args: &Args) -> Result<ExitCode> {
    let started = Instant::now();
    let mut report = Report::default();
    let guests = prepare(args, &mut report)?;
    report.add(boot_all(&guests)?)?;
    report.print(started)
}

/// Builds the tests, fetches the kernels. One that cannot be fetched is
/// skipped.
///
/// # Errors
/// When something cannot be built, or there is no such kernel.
pub fn prepare(args: &Args, report: &mut Report) -> Result<Vec<Guest>> {
    if let Some(tool) = TOOLS.iter().find(|tool| exec::find(tool).is_none()) {
        report.skip(&format!("kernels in guests: {tool} is missing"));
        return Ok(Vec::new());
    }
    let built = test::build(&["--test=kernel"])?;
    let test = built
        .tests
        .first()
        .context("cargo built no test `kernel`")?;
    let rungs = match args.rung.is_empty() {
        true => RUNGS.map(str::to_owned).to_vec(),
        false => args.rung.clone(),
    };
    let mut guests = Vec::new();
    for (kernel, unpacked) in kernels(args, report)? {
        let mut rungs = rungs.clone();
        if args.short && !guests.is_empty() {
            let left = rungs.split_off(1);
            println!(
                "not in the short form: kernel {kernel}: {}",
                left.join(", ")
            );
        }
        guests.push(Guest {
            name: format!("kernel-{kernel}"),
            kernel,
            unpacked,
            agent: built.agent.clone(),
            test: test.path.clone(),
            rungs,
            scenario: args.scenario.clone(),
            verbose: args.verbose,
        });
    }
    Ok(guests)
}

/// Name and files of the kernels asked for.
fn kernels(args: &Args, report: &mut Report) -> Result<Vec<(String, Unpacked)>> {
    if let Some(vmlinuz) = &args.vmlinuz {
        let unpacked = Unpacked {
            vmlinuz: vmlinuz.clone(),
            modules: None,
        };
        return Ok(vec![(OWN.to_owned(), unpacked)]);
    }
    for asked in &args.kernel {
        ensure!(
            KERNELS.iter().any(|kernel| kernel.name == asked),
            "--kernel {asked}: there are {}",
            KERNELS.map(|kernel| kernel.name).join(", ")
        );
    }
    let asked =
        |kernel: &&Kernel| args.kernel.is_empty() || args.kernel.iter().any(|a| a == kernel.name);
    let mut fetched = Vec::new();
    for kernel in KERNELS.iter().filter(asked) {
        match kernel.fetch(&exec::target_dir().join("vm")) {
            Ok(unpacked) => fetched.push((kernel.name.to_owned(), unpacked)),
            Err(error) => report.skip(&format!("kernel {}: {error:#}", kernel.name)),
        }
    }
    Ok(fetched)
}

/// Boots every guest, a few at once, and prints a line for each.
///
/// # Errors
/// When a guest cannot be packed.
pub fn boot_all(guests: &[Guest]) -> Result<Vec<(&dyn Target, Results)>> {
    let waiting = Mutex::new(guests.iter());
    let next = || waiting.lock().ok().and_then(|mut guests| guests.next());
    let boot = || {
        let mut booted: Vec<(&dyn Target, Results)> = Vec::new();
        while let Some(guest) = next() {
            let started = Instant::now();
            let results = guest.run(&[])?;
            report::progress(&guest.name, &results, started);
            booted.push((guest, results));
        }
        anyhow::Ok(booted)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..GUESTS).map(|_| scope.spawn(boot)).collect();
        let mut booted = Vec::new();
        for thread in threads {
            booted.extend(
                thread
                    .join()
                    .map_err(|_| anyhow!("a guest's thread panicked"))??,
            );
        }
        Ok(booted)
    })
}

impl Target for Guest {
    fn name(&self) -> &str {
        &self.name
    }

    /// A guest that stopped on its way, with nothing failed until then, is
    /// booted once more: an emulated kernel hangs now and then on a busy
    /// machine.
    fn run(&self, names: &[String]) -> Result<Results> {
        let first = self.boot(names)?;
        if first.ended || first.failed.len() > 1 {
            return Ok(first);
        }
        let stopped = first.failed.into_iter().next();
        let message = stopped.map_or_else(String::new, |failure| failure.message);
        let note = format!("retried: {}: {message}", self.name);
        println!("{note}");
        let mut second = self.boot(names)?;
        second.notes.push(note);
        Ok(second)
    }
}

impl Guest {
    /// One boot to the end; what QEMU itself does wrong is a failed test.
    fn boot(&self, names: &[String]) -> Result<Results> {
        let dir = exec::target_dir().join("vm").join(&self.kernel);
        std::fs::create_dir_all(&dir)?;
        let runs: Vec<String> = match names {
            [] => vec![exec::quoted(self.scenario.as_deref().unwrap_or_default())],
            names => names
                .iter()
                .map(|name| format!("--exact {}", exec::quoted(name)))
                .collect(),
        };
        let initrd = image::pack(
            &dir,
            &self.unpacked,
            (&self.agent, &self.test),
            &self.rungs,
            &runs,
        )
        .with_context(|| format!("packing for kernel {}", self.kernel))?;
        let mut command = Command::new("nice");
        command
            .args(["-n", "19", "qemu-system-x86_64"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"])
            .args(["-m", "2048", "-nographic", "-no-reboot", "-nic", "none"])
            .arg("-kernel")
            .arg(&self.unpacked.vmlinuz)
            .arg("-initrd")
            .arg(initrd)
            .args(["-append", BOOT])
            .stderr(Stdio::null());
        let mut details = report::details(&self.name, names.is_empty())?;
        let mut results = Results::default();
        let (mut ended, mut ran) = (false, 0);
        let booted = exec::lines(&mut command, TIME, |line| {
            if self.verbose {
                println!("[{}] {line}", self.name);
            }
            ended |= line == "guest: end";
            ran += usize::from(
                ["guest: run ended with 0", "guest: run ended with 101"].contains(&line),
            );
            let text = results.line(line);
            let _ = details.write_all(text.as_bytes());
        });
        self.judge(&mut results);
        results.ended = ended && ran == runs.len();
        match booted {
            Err(error) => results.fail(format!("{error:#}")),
            Ok(_) if !results.ended => {
                results.fail("the guest stopped before its tests ended".into())
            }
            Ok(_) => {}
        }
        Ok(results)
    }

    /// What a guest calls not applicable must be expected. A guest has not
    /// all tools of the host, so what it skips does not count.
    fn judge(&self, results: &mut Results) {
        results.notes.retain(|note| !note.starts_with("skipped: "));
        for name in results.ignored.drain(..) {
            let scenario = name.rsplit("::").next().unwrap_or_default();
            if self.kernel != OWN && !EXPECTED.contains(&(&self.kernel, scenario)) {
                results.failed.push(Failure {
                    test: name,
                    message: "not applicable here, which is not expected".into(),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(kernel: &str) -> Guest {
        Guest {
            name: format!("kernel-{kernel}"),
            kernel: kernel.to_owned(),
            unpacked: Unpacked {
                vmlinuz: PathBuf::new(),
                modules: None,
            },
            agent: PathBuf::new(),
            test: PathBuf::new(),
            rungs: Vec::new(),
            scenario: None,
            verbose: false,
        }
    }

    #[test]
    fn a_guest_may_lack_only_what_is_expected() {
        for (kernel, failed) in [("5.10", 0), ("6.1", 1), (OWN, 0)] {
            let mut results = Results {
                ignored: vec!["fentry::mptcp".into()],
                notes: vec![
                    "skipped: a scrape: promtool: not found".into(),
                    "not applicable: fentry::mptcp: protocol not supported".into(),
                ],
                ..Results::default()
            };
            guest(kernel).judge(&mut results);
            assert_eq!(results.failed.len(), failed, "{kernel}");
            assert_eq!(results.notes.len(), 1, "{:?}", results.notes);
        }
    }
}
