//! Log lines on stderr, logfmt or JSON, behind the `log` facade.
//!
//! Unprintable characters are escaped, so that a message cannot forge another
//! line. The lines of each place in the sources are limited; the next line
//! after the limit has the number of those left out. The agent writes them in
//! a thread of its own, so that nothing else waits for a reader of stderr.

mod background;

pub use background::{enter_sandbox, write_in_background};

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use connmon_core::text::{is_unprintable, printable};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::config::LogFormat;

/// Starts logging. Later calls change nothing.
pub fn init(level: LevelFilter, format: LogFormat) {
    if FORMAT.set(format).is_ok() && log::set_logger(&Logger).is_ok() {
        log::set_max_level(level);
    }
}

static FORMAT: OnceLock<LogFormat> = OnceLock::new();

/// Logs an error that ends the process, after all other lines. Gives up after
/// a second when nobody reads stderr.
pub fn last_error(target: &str, message: &str) {
    background::last_line(line_now(Level::Error, target, message));
}

/// Writes the last line of a process that failed: one for people, or a log
/// line where the format is JSON. No level hides it.
pub fn last_line(format: LogFormat, message: &str) {
    let line = match format {
        LogFormat::Logfmt => {
            let lines = message.lines().map(|line| format!("{}\n", printable(line)));
            format!("connmon: {}", lines.collect::<String>())
        }
        LogFormat::Json => line(format, SystemTime::now(), Level::Error, "connmon", message),
    };
    background::last_line(line);
}

/// Most lines of one place in the sources within [`LIMIT_PERIOD`]: traffic can
/// cause some of them.
const LIMIT_LINES: u64 = 10;

/// See [`LIMIT_LINES`].
const LIMIT_PERIOD: Duration = Duration::from_secs(10);

/// Since when lines of each place in the sources are counted, and how many.
/// The places bound the table.
#[derive(Debug, Default)]
struct Limiter(HashMap<(&'static str, u32), (Instant, u64)>);

impl Limiter {
    /// How many lines of this place were left out before this one; `None` where
    /// this one is left out.
    fn admit(&mut self, place: (&'static str, u32), now: Instant) -> Option<u64> {
        let (since, lines) = self.0.entry(place).or_insert((now, 0));
        let mut left_out = 0;
        if now.duration_since(*since) >= LIMIT_PERIOD {
            left_out = lines.saturating_sub(LIMIT_LINES);
            (*since, *lines) = (now, 0);
        }
        *lines += 1;
        (*lines <= LIMIT_LINES).then_some(left_out)
    }
}

/// As [`Limiter::admit`]; debug and trace lines are not limited.
fn admit(record: &Record<'_>) -> Option<u64> {
    static LIMITER: LazyLock<Mutex<Limiter>> = LazyLock::new(Mutex::default);
    let (Some(file), Some(line)) = (record.file_static(), record.line()) else {
        return Some(0);
    };
    if record.level() > Level::Info {
        return Some(0);
    }
    let mut limiter = LIMITER.lock().unwrap_or_else(PoisonError::into_inner);
    limiter.admit((file, line), Instant::now())
}

#[derive(Debug)]
struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let message = match admit(record) {
            None => return,
            Some(0) => record.args().to_string(),
            Some(left_out) => format!("{} ({left_out} more like this left out)", record.args()),
        };
        background::write(line_now(record.level(), record.target(), &message));
    }

    fn flush(&self) {
        background::flush();
    }
}

fn line_now(level: Level, target: &str, message: &str) -> String {
    let format = *FORMAT.get().unwrap_or(&LogFormat::Logfmt);
    line(format, SystemTime::now(), level, target, message)
}

fn line(format: LogFormat, now: SystemTime, level: Level, target: &str, message: &str) -> String {
    let ts = humantime::format_rfc3339_millis(now);
    let level = level.as_str().to_ascii_lowercase();
    let message = quoted(message);
    match format {
        LogFormat::Logfmt if !target.is_empty() && target.bytes().all(is_bare) => {
            format!("ts={ts} level={level} target={target} msg={message}\n")
        }
        LogFormat::Logfmt => {
            format!(
                "ts={ts} level={level} target={} msg={message}\n",
                quoted(target)
            )
        }
        LogFormat::Json => {
            let target = quoted(target);
            format!(
                "{{\"ts\":\"{ts}\",\"level\":\"{level}\",\"target\":{target},\"msg\":{message}}}\n"
            )
        }
    }
}

fn is_bare(byte: u8) -> bool {
    byte.is_ascii_graphic() && !matches!(byte, b'"' | b'=' | b'\\')
}

/// A JSON string, which logfmt readers take between quotes too. Escaped beyond
/// JSON's needs: everything that [`is_unprintable`] names.
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    for c in serde_json::Value::from(text).to_string().chars() {
        if is_unprintable(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(quoted, "\\u{unit:04x}");
            }
        } else {
            quoted.push(c);
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &str = "a \"b\" \\ \n\r\t\u{1b}[31m\u{7f}\u{85}\u{2028}\u{202e}\u{e0001}é";

    #[test]
    fn a_message_stays_on_one_line() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        assert_eq!(
            line(LogFormat::Logfmt, now, Level::Info, "connmon::agent", "up"),
            "ts=2023-11-14T22:13:20.123Z level=info target=connmon::agent msg=\"up\"\n"
        );
        let line = line(LogFormat::Logfmt, now, Level::Warn, "a b", HOSTILE);
        assert_eq!(line.matches('\n').count(), 1);
        assert!(!line.trim_end().contains(char::is_control), "{line}");
        assert!(line.contains(r#"target="a b" msg="a \"b\" \\ \n\r\t\u001b[31m\u007f"#));
    }

    #[test]
    fn json_reads_back() {
        let line = line(
            LogFormat::Json,
            SystemTime::now(),
            Level::Error,
            "t",
            HOSTILE,
        );
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["msg"], HOSTILE);
        assert_eq!(value["level"], "error");
    }

    #[test]
    fn each_place_logs_a_bounded_number_of_lines() {
        let mut limiter = Limiter::default();
        let start = Instant::now();
        let (one, other) = (("a.rs", 1), ("a.rs", 2));
        for _ in 0..LIMIT_LINES {
            assert_eq!(limiter.admit(one, start), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(limiter.admit(one, start + Duration::from_secs(9)), None);
        }
        assert_eq!(limiter.admit(other, start), Some(0));
        assert_eq!(limiter.admit(one, start + LIMIT_PERIOD), Some(5));
        assert_eq!(limiter.admit(one, start + LIMIT_PERIOD), Some(0));
        assert_eq!(limiter.admit(one, start + 2 * LIMIT_PERIOD), Some(0));
    }
}
