//! The agent's stderr is a pipe that nobody reads.

use std::io::{ErrorKind, PipeReader, PipeWriter, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::harness::{Agent, PATIENCE, get};

/// A pipe that takes nothing until it is read.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
    let full = loop {
        if let Err(error) = writer.write(b"\n") {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

struct Running {
    child: Child,
    address: String,
}

impl Running {
    /// With a debug line for every request.
    fn start(stderr: PipeWriter) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap().to_string();
        drop(free);
        let mut command = Agent::binary();
        command
            .args(["--web.listen-address", &address, "--log.level", "debug"])
            .stdout(Stdio::null())
            .stderr(stderr);
        let running = Self {
            child: command.spawn().unwrap(),
            address,
        };
        let until = Instant::now() + PATIENCE;
        while !matches!(get(&running.address, "/-/ready"), Ok((200, _))) {
            assert!(Instant::now() < until, "the agent is not ready");
            std::thread::sleep(Duration::from_millis(20));
        }
        running
    }

    /// Ends it by SIGTERM.
    fn stop(mut self) -> ExitStatus {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        assert!(sent.success());
        end(&mut self.child)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn end(child: &mut Child) -> ExitStatus {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > until {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the agent does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_full_stderr_delays_neither_scrapes_nor_the_end() {
    let (mut reader, writer) = full_pipe();
    let running = Running::start(writer);
    // More lines than the queue takes, of one connection.
    let mut stream = TcpStream::connect(&running.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!(
        "GET /-/healthy HTTP/1.1\r\nHost: {}\r\n\r\n",
        running.address
    );
    let mut answer = [0; 4096];
    for _ in 0..5_000 {
        stream.write_all(request.as_bytes()).unwrap();
        assert!(stream.read(&mut answer).unwrap() > 0);
    }
    let (status, _) = get(&running.address, "/metrics").unwrap();
    assert_eq!(status, 200);
    // Now somebody reads.
    let log = std::thread::spawn(move || {
        let mut log = Vec::new();
        let mut part = [0; 65_536];
        let until = Instant::now() + PATIENCE;
        loop {
            let length = reader.read(&mut part).unwrap();
            log.extend_from_slice(&part[..length]);
            let text = String::from_utf8_lossy(&log);
            if text.contains("log lines dropped") {
                // Kept, but read no more.
                return (text.into_owned(), reader);
            }
            assert!(
                length > 0 && Instant::now() < until,
                "none dropped:\n{text}"
            );
        }
    });
    let (log, _reader) = log.join().unwrap();
    assert!(log.contains("GET /-/healthy 200"), "{log}");
    assert!(running.stop().success());
}

#[test]
fn a_full_stderr_does_not_keep_the_agent_alive() {
    let (_reader, writer) = full_pipe();
    assert!(Running::start(writer).stop().success());

    let (_reader, writer) = full_pipe();
    let mut failing = Agent::binary();
    failing
        .args(["--geoip.database", "/nonexistent"])
        .stderr(writer);
    let mut child = failing.spawn().unwrap();
    drop(failing);
    assert_eq!(end(&mut child).code(), Some(1));
}
