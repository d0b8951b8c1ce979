//! Network namespaces made for a test and deleted after it.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Whether the test may make namespaces. Prints why not, and fails then under
/// `CI=true`.
pub fn may_run(what: &str) -> bool {
    let reason = if !rustix::process::geteuid().is_root() {
        "needs root"
    } else if Command::new("ip").arg("-V").output().is_err() {
        "needs iproute2"
    } else {
        return true;
    };
    println!("skipped: {what}: {reason}");
    assert!(
        std::env::var_os("CI").is_none_or(|ci| ci != "true"),
        "{reason}"
    );
    false
}

/// What precedes the process id in the names that the tests and benches give.
const PREFIXES: [&str; 5] = [
    "reconcile-",
    "reconcile-bench-",
    "metrics-connmon-",
    "xtask-k",
    "xtask-r",
];

/// Removes the namespaces of test runs that were killed: a test that counts
/// every namespace would count them.
pub fn remove_those_of_dead_runs() {
    let names = std::fs::read_dir("/run/netns").into_iter().flatten();
    for name in names.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        let pid = PREFIXES.iter().find_map(|prefix| {
            let pid = name.strip_prefix(prefix)?.split('-').next()?;
            pid.parse::<u32>().ok()
        });
        let Some(pid) = pid else { continue };
        if Path::new("/proc").join(pid.to_string()).exists() {
            continue;
        }
        let ip = Command::new("ip").args(["netns", "delete", &name]).output();
        println!("removed network namespace {name}: process {pid} has ended; {ip:?}");
    }
}

/// A namespace with `lo` up, made with `ip netns add`.
pub struct Namespace {
    pub name: String,
}

impl Namespace {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        static DEAD_RUNS: Once = Once::new();
        DEAD_RUNS.call_once(remove_those_of_dead_runs);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("reconcile-{}-{count}", std::process::id());
        ip(&["netns", "add", &name]);
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        Self { name }
    }

    pub fn inode(&self) -> u32 {
        self.file().metadata().unwrap().ino().try_into().unwrap()
    }

    /// Runs `inside` on a thread of its own within the namespace; what it
    /// opens stays there.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let file = self.file();
        std::thread::scope(|scope| {
            scope
                .spawn(move || {
                    enter(&file);
                    inside()
                })
                .join()
                .unwrap()
        })
    }

    /// Runs a command inside and gives its output.
    pub fn output(&self, command: &[&str]) -> String {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.name])
            .args(command)
            .output()
            .unwrap();
        assert!(output.status.success(), "{command:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A process that does nothing inside, until dropped.
    pub fn resident(&self) -> Resident {
        let resident = Resident(
            Command::new("ip")
                .args(["netns", "exec", &self.name, "sleep", "600"])
                .spawn()
                .unwrap(),
        );
        // `ip` enters the namespace before it becomes `sleep`.
        let link = format!("/proc/{}/ns/net", resident.pid());
        let inode = u64::from(self.inode());
        wait_until(|| std::fs::metadata(&link).unwrap().ino() == inode);
        resident
    }

    fn file(&self) -> File {
        File::open(format!("/run/netns/{}", self.name)).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .status();
    }
}

pub struct Resident(Child);

impl Resident {
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Moves the calling thread, for good.
pub fn enter(namespace: &File) {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
}

/// Waits, for a minute at most.
pub fn wait_until(mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < until, "waited a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {output:?}");
}
