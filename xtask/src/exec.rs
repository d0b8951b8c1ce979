//! Runs other programs. An error names the command as it is typed.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

/// The root of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
        .to_path_buf()
}

/// Where cargo builds to.
pub fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// Where cargo keeps its registry and installed binaries.
pub fn cargo_home() -> PathBuf {
    std::env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    )
}

/// The cargo that runs this task.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The command as it is typed.
pub fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| quoted(&word.to_string_lossy()))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Quotes a word for a shell, if it needs that.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Runs a command to its end, with our standard input and output.
///
/// # Errors
/// When it cannot be started or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    ensure!(status.success(), "`{}` failed: {status}", shown(command));
    Ok(())
}

/// Runs a command to its end and returns its standard output, trimmed.
///
/// # Errors
/// When it cannot be started, fails or prints no UTF-8.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    ensure!(
        output.status.success(),
        "`{}` failed: {}",
        shown(command),
        output.status
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Lines that wait to be handled; a command that prints faster waits.
const LINES: usize = 1_024;

/// Runs a command for at most `time` and passes each line that it prints to
/// `each`. It is killed when the time is over.
///
/// # Errors
/// When it cannot be started or takes longer.
pub fn lines(
    command: &mut Command,
    time: Duration,
    mut each: impl FnMut(&str),
) -> Result<ExitStatus> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    let output = child.stdout.take().context("stdout is piped")?;
    let (sender, receiver) = mpsc::sync_channel(LINES);
    std::thread::spawn(move || read_lines(output, &sender));
    let until = Instant::now() + time;
    loop {
        match receiver.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => each(&line),
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(child.wait()?),
            Err(mpsc::RecvTimeoutError::Timeout) => break,
        }
    }
    child.kill()?;
    child.wait()?;
    bail!(
        "`{}` did not end within {} s",
        shown(command),
        time.as_secs()
    );
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

/// The body of an HTTP answer with status 200.
///
/// # Errors
/// When nobody answers within a minute, or with another status.
pub fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: xtask\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("the answer has no head")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{address}{path}: {head}");
    Ok(body.to_owned())
}

/// The path of a program on the PATH or in sbin.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Whether this process is root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_back_a_shown_command() {
        let words = ["plain-1", "two words", "it's", "", "$(date) *", "\"q\" \\"];
        let mut command = Command::new("printf");
        command.arg("%s\n").args(words);
        let text = output(Command::new("sh").args(["-c", &shown(&command)])).unwrap();
        assert_eq!(text.split('\n').collect::<Vec<_>>(), words);
    }

    #[test]
    fn a_command_that_hangs_is_killed() {
        let mut read = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; exec sleep 60"]);
        let error = lines(&mut command, Duration::from_millis(500), |line| {
            read.push(line.to_owned())
        });
        assert!(error.unwrap_err().to_string().contains("did not end"));
        assert_eq!(read, ["one"]);
    }
}
