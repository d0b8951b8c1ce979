//! Log lines on stderr, logfmt or JSON, behind the `log` facade.
//!
//! One line is one `write`; a line can never forge another, since
//! unprintable characters are escaped. Use [`limited!`](crate::limited) for messages
//! that traffic can cause.
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

/// Logs at most one line per key in ten seconds and says how many it left
/// out: `limited!(Level::Warn, "ring-full", "ring buffer full: {n} events")`.
#[macro_export]
macro_rules! limited {
    ($level:expr, $key:expr, $($message:tt)+) => {
        $crate::logging::log_limited(
            $level,
            module_path!(),
            $key,
            ::std::format_args!($($message)+),
        )
    };
}

/// See [`limited!`](crate::limited). `key` is one of a fixed set, which
/// bounds the table behind it.
pub fn log_limited(
    level: Level,
    target: &str,
    key: &'static str,
    message: std::fmt::Arguments<'_>,
) {
    if level > log::max_level() {
        return;
    }
    static LIMITER: LazyLock<Mutex<Limiter>> = LazyLock::new(Mutex::default);
    let verdict = LIMITER
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .admit(key, Instant::now());
    match verdict {
        None => {}
        Some(0) => log::log!(target: target, level, "{message}"),
        Some(left_out) => {
            log::log!(target: target, level, "{message} ({left_out} more like this left out)");
        }
    }
}

/// Time in which one key may log once.
const LIMIT_PERIOD: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Limiter(HashMap<&'static str, (Instant, u64)>);

impl Limiter {
    /// `Some(n)` when the message may be logged after `n` were left out.
    fn admit(&mut self, key: &'static str, now: Instant) -> Option<u64> {
        match self.0.get_mut(key) {
            None => {
                self.0.insert(key, (now, 0));
                Some(0)
            }
            Some((last, left_out)) if now.duration_since(*last) < LIMIT_PERIOD => {
                *left_out += 1;
                None
            }
            Some((last, left_out)) => {
                *last = now;
                Some(std::mem::take(left_out))
            }
        }
    }
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
        background::write(line_now(
            record.level(),
            record.target(),
            &record.args().to_string(),
        ));
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
    fn hot_messages_are_counted_not_written() {
        let mut limiter = Limiter::default();
        let start = Instant::now();
        assert_eq!(limiter.admit("a", start), Some(0));
        for _ in 0..5 {
            assert_eq!(limiter.admit("a", start + Duration::from_secs(9)), None);
        }
        assert_eq!(limiter.admit("b", start), Some(0));
        assert_eq!(limiter.admit("a", start + LIMIT_PERIOD), Some(5));
        assert_eq!(limiter.admit("a", start + 2 * LIMIT_PERIOD), Some(0));
    }
}
