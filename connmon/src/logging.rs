//! Log lines on stderr, logfmt or JSON, behind the `log` facade.
//!
//! One line is one `write`; a line can never forge another, since
//! unprintable characters are escaped. Each place in the sources logs a
//! bounded number of lines; the next one says how many were left out.
//!
//! The agent writes them in a thread of its own ([`write_in_background`]):
//! whoever reads stderr may stop reading, and nothing else waits for that.

mod background;

pub use background::{close_in, write_in_background};

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

/// Logs an error that ends the process, behind all other lines. It gives up
/// after a second when nobody reads stderr.
pub fn last_error(target: &str, message: &str) {
    background::last_line(line_now(Level::Error, target, message));
}

/// Most lines of one place in the sources within [`LIMIT_PERIOD`]: traffic can
/// cause some of them.
const LIMIT_LINES: u64 = 10;

/// See [`LIMIT_LINES`].
const LIMIT_PERIOD: Duration = Duration::from_secs(10);

/// The lines of each place in the sources, which bound the table.
#[derive(Debug, Default)]
struct Limiter(HashMap<(&'static str, u32), Place>);

#[derive(Debug)]
struct Place {
    since: Instant,
    lines: u64,
}

impl Limiter {
    /// Whether a line may be logged, and after how many that were not.
    fn admit(&mut self, place: (&'static str, u32), now: Instant) -> Option<u64> {
        let place = self.0.entry(place).or_insert(Place {
            since: now,
            lines: 0,
        });
        let mut left_out = 0;
        if now.duration_since(place.since) >= LIMIT_PERIOD {
            left_out = place.lines.saturating_sub(LIMIT_LINES);
            *place = Place {
                since: now,
                lines: 0,
            };
        }
        place.lines += 1;
        (place.lines <= LIMIT_LINES).then_some(left_out)
    }
}

/// Whether a record may be logged, and after how many of its place that were
/// not. Lines below info are for whoever asked for them, and all come.
fn admit(record: &Record<'_>) -> Option<u64> {
    static LIMITER: LazyLock<Mutex<Limiter>> = LazyLock::new(Mutex::default);
    let (Some(file), Some(line)) = (record.file_static(), record.line()) else {
        return Some(0);
    };
    if record.level() > Level::Info {
        return Some(0);
    }
    LIMITER
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .admit((file, line), Instant::now())
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
    let mut line = String::with_capacity(96 + message.len());
    let ts = humantime::format_rfc3339_millis(now);
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    match format {
        LogFormat::Logfmt => {
            let _ = write!(line, "ts={ts} level={level} target=");
            if target.bytes().all(is_bare) && !target.is_empty() {
                line.push_str(target);
            } else {
                quote(&mut line, target);
            }
            line.push_str(" msg=");
        }
        LogFormat::Json => {
            let _ = write!(line, r#"{{"ts":"{ts}","level":"{level}","target":"#);
            quote(&mut line, target);
            line.push_str(r#","msg":"#);
        }
    }
    quote(&mut line, message);
    line.push_str(match format {
        LogFormat::Logfmt => "\n",
        LogFormat::Json => "}\n",
    });
    line
}

fn is_bare(byte: u8) -> bool {
    byte.is_ascii_graphic() && !matches!(byte, b'"' | b'=' | b'\\')
}

/// A JSON string, which is also what logfmt readers take between quotes.
/// Escaped beyond JSON's needs: everything that [`is_unprintable`] names.
fn quote(line: &mut String, text: &str) {
    line.push('"');
    for c in text.chars() {
        match c {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            c if is_unprintable(c) => {
                let _ = write!(line, "\\u{:04x}", u32::from(c));
            }
            c => line.push(c),
        }
    }
    line.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &str = "a \"b\" \\ \n\r\t\u{1b}[31m\u{7f}\u{85}\u{2028}\u{202e}é";

    #[test]
    fn a_line_is_a_line() {
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
