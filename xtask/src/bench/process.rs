//! The programs under measurement: started, pinned, watched, ended.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::exec;

/// How long a program may take to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// A child that ends with this value.
#[derive(Debug)]
pub struct Running {
    child: Child,
}

impl Running {
    /// Starts a program on these processors, a list as taskset takes it.
    pub fn start(command: &mut Command, cpus: &str) -> Result<Self> {
        let mut pinned = Command::new("taskset");
        pinned
            .args(["-c", cpus])
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = pinned
            .spawn()
            .with_context(|| format!("cannot start `{}`", exec::shown(&pinned)))?;
        Ok(Self { child })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Bytes of a field of /proc/PID/status.
    pub fn status_bytes(&self, field: &str) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
            .with_context(|| format!("no {field} in /proc/PID/status"))?;
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").trim().parse()?;
        Ok(kilobytes * 1024)
    }

    /// CPU seconds so far.
    pub fn cpu_seconds(&self) -> Result<f64> {
        // A process's schedstat is its main thread's: sum over all.
        let mut nanoseconds = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let text = fs::read_to_string(task?.path().join("schedstat"))?;
            let first = text.split(' ').next().unwrap_or("0");
            nanoseconds += first.parse::<u64>()?;
        }
        Ok(nanoseconds as f64 / 1e9)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SIGINT: what contenders end on cleanly.
        let _ = Command::new("kill")
            .args(["-INT", &self.pid().to_string()])
            .status();
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The agent, ready.
#[derive(Debug)]
pub struct Agent {
    /// The process.
    pub process: Running,
    /// Where it serves.
    pub address: SocketAddr,
    /// Seconds from exec to the first good scrape.
    pub first_scrape_s: f64,
}

impl Agent {
    /// Starts the release agent on these processors and waits for a scrape
    /// with status 200.
    pub fn start(cpus: &str, args: &[&str]) -> Result<Self> {
        let address = free_address()?;
        let started = Instant::now();
        let process = Running::start(
            Command::new(exec::target_dir().join("release/connmon"))
                .args(["--web.listen-address", &address.to_string()])
                .args(["--filter.loopback", "include"])
                .args(args),
            cpus,
        )?;
        while exec::get(address, "/metrics").is_err() {
            ensure!(
                started.elapsed() < PATIENCE,
                "the agent at {address} is not ready after {PATIENCE:?}"
            );
            sleep(Duration::from_millis(1));
        }
        Ok(Self {
            process,
            address,
            first_scrape_s: started.elapsed().as_secs_f64(),
        })
    }

    /// One scrape.
    pub fn scrape(&self) -> Result<String> {
        exec::get(self.address, "/metrics")
    }
}

/// Sum of a family's samples.
pub fn sum(scrape: &str, family: &str) -> f64 {
    scrape
        .lines()
        .filter(|line| {
            line.strip_prefix(family)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        })
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// Samples in a scrape.
pub fn samples(scrape: &str) -> usize {
    scrape.lines().filter(|line| !line.starts_with('#')).count()
}

/// A loopback address that is free now.
pub fn free_address() -> Result<SocketAddr> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// A tool of this program (see `tool.rs`) that runs until dropped.
#[derive(Debug)]
pub struct Tool {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Tool {
    /// Starts it and waits for its `ready`.
    pub fn start(args: &[&str]) -> Result<Self> {
        let mut command = tool(args)?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{}`", exec::shown(&command)))?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("piped")?).read_line(&mut line)?;
        ensure!(line.trim() == "ready", "bench-tool {args:?} is not ready");
        Ok(Self {
            stdin: child.stdin.take(),
            child,
        })
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        // The end of its stdin is what it waits for.
        self.stdin = None;
        let _ = self.child.wait();
    }
}

/// Runs a tool to its end; what it printed.
pub fn output(args: &[&str]) -> Result<String> {
    exec::output(&mut tool(args)?)
}

fn tool(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("bench-tool").args(args);
    Ok(command)
}

/// Connections per second that `load` makes on a processor.
pub fn load(cpu: usize, seconds: f64, extra: &[&str]) -> Result<f64> {
    let (cpu, seconds) = (cpu.to_string(), seconds.to_string());
    let text = output(&[&["--cpu", &cpu, "load", "--seconds", &seconds], extra].concat())?;
    let mut words = text.split_whitespace();
    let mut number =
        || -> Result<f64> { Ok(words.next().context("load printed nothing")?.parse()?) };
    Ok(number()? / number()?)
}
