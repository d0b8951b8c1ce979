//! The agent under a service manager, and on a kernel without part of the
//! sandbox.

use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::harness::{Agent, PATIENCE};

const SIGTERM: i32 = 15;

/// A service manager's end of sd_notify(3).
struct Manager {
    socket: UnixDatagram,
    _directory: tempfile::TempDir,
}

impl Manager {
    /// Sets NOTIFY_SOCKET for a command.
    fn of(command: &mut Command, watchdog: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        command.env("NOTIFY_SOCKET", path);
        command.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
        Self {
            socket,
            _directory: directory,
        }
    }

    fn receive(&self) -> String {
        let mut buffer = [0; 512];
        let length = self
            .socket
            .recv(&mut buffer)
            .expect("a notification of the agent");
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }
}

#[test]
fn a_service_manager_gets_ready_alive_and_stopping() {
    let mut command = Agent::binary();
    command.args(["--filter.loopback", "include"]);
    let manager = Manager::of(&mut command, Duration::from_millis(400));
    let starting = std::thread::spawn(|| Agent::spawn(command));
    // Nothing is alive before it is ready.
    let mut first = manager.receive();
    while first == "WATCHDOG=1" {
        first = manager.receive();
    }
    assert!(first.starts_with("READY=1\nSTATUS="), "{first:?}");
    let mut agent = starting.join().unwrap();
    // The agent logs its address only after that.
    assert_eq!(agent.telemetry_status(), 200);
    for _ in 0..3 {
        assert_eq!(manager.receive(), "WATCHDOG=1");
    }
    agent.check_laws();
    agent.signal(SIGTERM);
    let mut last = manager.receive();
    while last == "WATCHDOG=1" {
        last = manager.receive();
    }
    assert_eq!(last, "STOPPING=1");
    assert_eq!(agent.wait().code(), Some(0), "{}", agent.log());
    manager.socket.set_nonblocking(true).unwrap();
    let silence = manager.socket.recv(&mut [0; 512]).unwrap_err();
    assert_eq!(silence.kind(), ErrorKind::WouldBlock, "nothing after that");
}

/// Runs `start` on a thread whose children find no Landlock in the kernel.
fn without_landlock<T: Send>(start: impl FnOnce() -> T + Send) -> T {
    let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
    let filter: BpfProgram = SeccompFilter::new(
        [(libc::SYS_landlock_create_ruleset, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        arch,
    )
    .and_then(TryInto::try_into)
    .unwrap();
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            seccompiler::apply_filter(&filter).unwrap();
            start()
        });
        inside.join().unwrap()
    })
}

#[test]
fn without_landlock_strict_refuses_and_names_it() {
    let output = without_landlock(|| {
        Agent::binary()
            .args(["--sandbox", "strict", "--source", "proc"])
            .args(["--web.listen-address", "127.0.0.1:0"])
            .output()
            .unwrap()
    });
    let printed = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{printed}");
    let refusals: Vec<_> = printed
        .lines()
        .filter(|line| line.contains("--sandbox strict"))
        .collect();
    assert_eq!(refusals.len(), 1, "{printed}");
    assert!(
        refusals[0].contains("landlock: not in this kernel"),
        "{printed}"
    );
    assert!(
        !printed.contains("shows the map"),
        "it never served: {printed}"
    );
}

#[test]
fn without_landlock_auto_serves_and_warns_once() {
    let agent = without_landlock(|| Agent::start(&["--source", "proc"]));
    assert_eq!(agent.telemetry_status(), 200);
    let log = agent.stop();
    let lacks: Vec<_> = log
        .lines()
        .filter(|line| line.contains("sandbox incomplete"))
        .collect();
    // Two threads lack it, for one reason.
    assert_eq!(lacks.len(), 1, "{log}");
    assert!(lacks[0].contains("landlock"), "{log}");
}
