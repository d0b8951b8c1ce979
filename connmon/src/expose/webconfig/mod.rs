//! `--web.config.file`: the Prometheus exporter-toolkit's web configuration,
//! with its keys, defaults and verdicts (prometheus/exporter-toolkit,
//! `web/tls_config.go`, `web/handler.go`).
//!
//! [`parse`] judges the text alone, [`check`] also what it points at, and
//! `Gate` is what the server asks: it notices changed files on the next
//! connection or request and keeps the last good settings when the new ones
//! are bad.
//!
//! Where this differs from the toolkit, because rustls does: TLS 1.0 and 1.1
//! are never spoken, CBC and RSA key exchange suites are accepted by name but
//! left out, and a file that leaves no version or suite at all is refused.
//! A file broken while running does not take the server down, and TLS cannot
//! be switched on or off without a restart (there, neither).

mod clients;
mod p521;
mod rate;
mod settings;
mod tls;
mod users;
mod yaml;

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::HeaderMap;
use rustls::ServerConfig;

use self::rate::Bucket;
pub use self::settings::Settings;
use self::users::{Doorkeeper, Verdict};
use self::yaml::Problem;
use crate::config::ConfigError;
use crate::read_file::read_file;

/// Judges the text of a web configuration at `path`, whose directory
/// relative paths start from; no file is opened. Total: any text gives
/// settings or an error that names the line.
pub fn parse(text: &str, path: &Path) -> Result<Settings, ConfigError> {
    let directory = path.parent().unwrap_or(Path::new(""));
    let settings = Settings::parse(text, directory).map_err(|problem| at(path, &problem))?;
    if let Some(tls) = &settings.tls {
        tls.choose().map_err(|problem| at(path, &problem))?;
    }
    Ok(settings)
}

/// Judges a web configuration with all the files it names, and throws it
/// away again.
pub fn check(path: &Path) -> Result<(), ConfigError> {
    load(path, &mut Vec::new()).map(drop)
}

fn at(path: &Path, problem: &Problem) -> ConfigError {
    let Problem { line, text } = problem;
    match line {
        0 => ConfigError::new(format!("{}: {text}", path.display())),
        line => ConfigError::new(format!("{}:{line}: {text}", path.display())),
    }
}

/// What is in force.
pub(super) struct Active {
    settings: Settings,
    tls: Option<Arc<ServerConfig>>,
    remarks: Vec<String>,
}

/// Reads and judges everything. `prints` tells which files that took, and
/// their state before they were read, so that what changes meanwhile is
/// noticed next time.
fn load(path: &Path, prints: &mut Vec<Print>) -> Result<Active, ConfigError> {
    prints.push(Print::of(path));
    let bytes = read_file(path, tls::MAX_PEM_BYTES)
        .map_err(|error| ConfigError::new(format!("{}: cannot read: {error}", path.display())))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        at(path, &Problem::new(line, "not valid UTF-8"))
    })?;
    let settings = parse(&text, path)?;
    let (tls, remarks) = match &settings.tls {
        None => (None, Vec::new()),
        Some(tls) => {
            prints.extend(tls.files().map(Print::of));
            let (config, remarks) = tls
                .load(settings.http2)
                .map_err(|problem| at(path, &problem))?;
            (Some(config), remarks)
        }
    };
    Ok(Active {
        settings,
        tls,
        remarks,
    })
}

/// What tells one state of a file from another without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Print {
    path: PathBuf,
    /// Device, inode, size, mtime and ctime; `None` when there is no file.
    state: Option<[i64; 7]>,
}

impl Print {
    fn of(path: &Path) -> Self {
        let state = std::fs::metadata(path).ok().map(|meta| {
            [
                meta.dev().cast_signed(),
                meta.ino().cast_signed(),
                meta.size().cast_signed(),
                meta.mtime(),
                meta.mtime_nsec(),
                meta.ctime(),
                meta.ctime_nsec(),
            ]
        });
        Self {
            path: path.to_owned(),
            state,
        }
    }

    fn is_current(&self) -> bool {
        Self::of(&self.path) == *self
    }
}

/// A broken configuration is read again after this time though nothing has
/// changed: there may have been no descriptor left to read it with.
const RETRY: Duration = Duration::from_secs(1);

/// What the gate says to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Come in.
    Open,
    /// 429: above `rate_limit`.
    TooMany,
    /// 401: no credentials, or wrong ones.
    Unauthorized,
    /// 503: too many credentials wait to be checked.
    Busy,
}

/// The web configuration in force, followed as its files change.
pub(super) struct Gate {
    path: PathBuf,
    state: Mutex<State>,
    doorkeeper: Doorkeeper,
}

struct State {
    active: Arc<Active>,
    /// Of every file involved, when it was last judged.
    prints: Vec<Print>,
    bucket: Option<Bucket>,
    /// When the last attempt was, if it failed; the first of several that
    /// fail is complained about.
    broken: Option<Instant>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gate").field(&self.path).finish()
    }
}

impl Gate {
    /// Reads the configuration and all it names.
    pub(super) fn open(path: &Path) -> Result<Self, ConfigError> {
        let mut prints = Vec::new();
        let active = load(path, &mut prints)?;
        for remark in &active.remarks {
            log::warn!("{}: {remark}", path.display());
        }
        let doorkeeper = Doorkeeper::new().map_err(ConfigError::new)?;
        Ok(Self {
            path: path.to_owned(),
            state: Mutex::new(State {
                bucket: bucket(&active.settings),
                active: Arc::new(active),
                prints,
                broken: None,
            }),
            doorkeeper,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The files to be readable for as long as the server runs.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let state = self.state();
        state
            .prints
            .iter()
            .map(|print| print.path.clone())
            .collect()
    }

    /// Whether connections are TLS; does not change while running.
    pub(super) fn is_tls(&self) -> bool {
        self.state().active.tls.is_some()
    }

    /// The TLS configuration of a connection that begins now.
    pub(super) fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.current().tls.clone()
    }

    /// Takes up what has changed and is good. A few `stat` calls, so that it
    /// can be asked for every connection and request.
    pub(super) fn current(&self) -> Arc<Active> {
        let mut state = self.state();
        let retry = state.broken.is_some_and(|since| since.elapsed() >= RETRY);
        if retry || !state.prints.iter().all(Print::is_current) {
            self.reload(&mut state);
        }
        Arc::clone(&state.active)
    }

    fn reload(&self, state: &mut State) {
        let mut prints = Vec::new();
        let loaded = load(&self.path, &mut prints).and_then(|active| {
            if active.settings.is_blank && !state.active.settings.is_blank {
                // Emptied to be written anew, or for want of space: nobody's
                // wish to open the door. `{}` is.
                return Err(ConfigError::new(format!(
                    "{}: the file is empty; write {{}} for no settings",
                    self.path.display()
                )));
            }
            if active.tls.is_some() != state.active.tls.is_some() {
                return Err(ConfigError::new(format!(
                    "{}: TLS cannot be switched on or off while running; restart connmon",
                    self.path.display()
                )));
            }
            Ok(active)
        });
        match loaded {
            Ok(active) => {
                for remark in &active.remarks {
                    log::warn!("{}: {remark}", self.path.display());
                }
                log::info!(
                    "{}: changed web configuration in force",
                    self.path.display()
                );
                let rate = state.bucket.as_ref().map(Bucket::rate);
                if rate != active.settings.rate {
                    state.bucket = bucket(&active.settings);
                }
                state.active = Arc::new(active);
                state.broken = None;
            }
            Err(error) => {
                if state.broken.replace(Instant::now()).is_some() {
                    log::debug!("{error}; still keeping the old web configuration");
                } else {
                    log::error!("{error}; keeping the old web configuration");
                }
                renew(&mut state.active, &mut prints);
            }
        }
        state.prints = prints;
    }

    /// Whether a request with these headers is let in.
    pub(super) async fn ask(&self, headers: &HeaderMap) -> Entry {
        let active = self.current();
        if let Some(bucket) = &mut self.state().bucket
            && !bucket.allow(Instant::now())
        {
            return Entry::TooMany;
        }
        if active.settings.users.is_empty() {
            return Entry::Open;
        }
        match self.doorkeeper.check(headers, &active.settings.users).await {
            Verdict::Allowed => Entry::Open,
            Verdict::Refused => Entry::Unauthorized,
            Verdict::Busy => Entry::Busy,
        }
    }

    /// Puts the configured headers in place of the built-in ones; a blank
    /// one removes it.
    pub(super) fn decorate(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.state().active.settings.headers {
            if value.is_empty() {
                headers.remove(name);
            } else {
                headers.insert(name, value.clone());
            }
        }
    }
}

/// Reads again the certificates and keys of settings that stay in force: they
/// are renewed whatever happens to the file that names them.
fn renew(active: &mut Arc<Active>, prints: &mut Vec<Print>) {
    let Some(tls) = &active.settings.tls else {
        return;
    };
    prints.extend(tls.files().map(Print::of));
    // What does not fit is not in force either way.
    if let Ok((config, remarks)) = tls.load(active.settings.http2) {
        *active = Arc::new(Active {
            settings: active.settings.clone(),
            tls: Some(config),
            remarks,
        });
    }
}

fn bucket(settings: &Settings) -> Option<Bucket> {
    let rate = settings.rate?;
    Some(Bucket::new(rate, Instant::now()))
}
