//! State changes that the kernel hides from BPF programs.
//!
//! The kernels of some virtual machines run no BPF program while a thread of
//! PID 1 is the current task, and count no miss. An interrupt that comes then
//! may handle a whole batch of packets, whose state changes no agent can see.
//! ftrace sees them, so a test can tell them from a fault of the agent.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const TRACEFS: &str = "/sys/kernel/tracing";

/// The tracepoint rung needs it; a bare machine has it mounted or not.
pub fn mount_tracefs() {
    if !Path::new(TRACEFS).join("events").exists() {
        let status = Command::new("mount")
            .args(["-t", "tracefs", "tracefs", TRACEFS])
            .status()
            .unwrap();
        assert!(status.success(), "mounting tracefs: {status}");
    }
}

/// Records the state changes of sockets under threads of PID 1.
pub struct HiddenChanges {
    instance: PathBuf,
}

impl HiddenChanges {
    pub fn record() -> Self {
        mount_tracefs();
        let name = format!("instances/connmon-test-{}", std::process::id());
        let instance = Path::new(TRACEFS).join(name);
        fs::create_dir(&instance).unwrap();
        let threads = fs::read_dir("/proc/1/task").unwrap();
        let threads: Vec<String> = threads
            .map(|thread| thread.unwrap().file_name().into_string().unwrap())
            .map(|id| format!("common_pid == {id}"))
            .collect();
        let recorder = Self { instance };
        recorder.write("buffer_size_kb", "4096");
        recorder.write(&format!("{EVENT}/filter"), &threads.join(" || "));
        recorder.write(&format!("{EVENT}/enable"), "1");
        recorder
    }

    /// How many there were of sockets with this port.
    pub fn count(&self, port: u16) -> usize {
        let ends = [format!(" sport={port} "), format!(" dport={port} ")];
        let trace = fs::read_to_string(self.instance.join("trace")).unwrap();
        let of_port = |line: &&str| ends.iter().any(|end| line.contains(end));
        trace.lines().filter(of_port).count()
    }

    fn write(&self, file: &str, value: &str) {
        fs::write(self.instance.join(file), value).unwrap();
    }
}

const EVENT: &str = "events/sock/inet_sock_set_state";

impl Drop for HiddenChanges {
    fn drop(&mut self) {
        self.write(&format!("{EVENT}/enable"), "0");
        let _ = fs::remove_dir(&self.instance);
    }
}
