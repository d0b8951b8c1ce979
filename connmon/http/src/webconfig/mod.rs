//! `--web.config.file`: the Prometheus exporter-toolkit's web configuration,
//! with its keys, defaults and verdicts (prometheus/exporter-toolkit,
//! `web/tls_config.go`, `web/handler.go`).
//!
//! [`parse`] judges the text alone, [`check`] also what it points at, and
//! `Gate` is what the server asks: it notices changed files on the next
//! connection or request and keeps the last good settings when the new ones
//! are bad.
//!
//! docs/web.md lists where this differs from the toolkit.

mod clients;
mod rate;
mod settings;
mod tls;
mod users;

use std::fmt;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::HeaderMap;
use rustls::ServerConfig;
use tokio::sync::Semaphore;

use self::rate::Bucket;
pub use self::settings::Settings;
use crate::read_file::read_file;

use crate::yaml::{self, Problem};
use crate::{ConfigError, is_state_of_host};

use self::users::{Doorkeeper, Verdict};

/// Judges the text of a web configuration at `path`, whose directory
/// relative paths start from; no file is opened. Total: any text gives
/// settings or an error that names the line.
pub fn parse(text: &str, path: &Path) -> Result<Settings, ConfigError> {
    let directory = path.parent().unwrap_or(Path::new(""));
    let judge = || {
        let settings = Settings::parse(text, directory)?;
        if let Some(tls) = &settings.tls {
            tls.choose()?;
        }
        Ok(settings)
    };
    judge().map_err(|problem: Problem| problem.of(path))
}

/// Judges a web configuration with all the files it names, and throws it
/// away again. What is accepted and should be changed is returned.
pub fn check(path: &Path) -> Result<Vec<String>, ConfigError> {
    let active = load(path, &mut Vec::new())?;
    let remark = |remark| format!("{}: {remark}", path.display());
    Ok(active.remarks.into_iter().map(remark).collect())
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
    let bytes = read_file(path, tls::MAX_PEM_BYTES).map_err(|error| {
        ConfigError::new(format_args!("{}: cannot read: {error}", path.display()))
            .not_yet_if(is_state_of_host(error.raw_os_error()))
    })?;
    let text = yaml::utf8(bytes).map_err(|problem| problem.of(path))?;
    let settings = parse(&text, path)?;
    let mut remarks = settings.remarks.clone();
    let tls = match &settings.tls {
        None => None,
        Some(tls) => {
            prints.extend(tls.files().map(Print::of));
            let (config, more) = tls
                .load(settings.http2)
                .map_err(|problem| problem.of(path))?;
            remarks.extend(more);
            Some(config)
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
    /// 503: too many credentials of this address wait to be checked.
    Busy,
}

/// How long a connection or request waits for a look at the files. Theirs may
/// be a file system that does not answer.
const LOOK_TIME: Duration = Duration::from_secs(1);

/// The web configuration in force, followed as its files change.
pub(super) struct Gate {
    followed: Arc<Followed>,
    doorkeeper: Doorkeeper,
}

struct Followed {
    path: PathBuf,
    state: Mutex<State>,
    /// Of one look at a time: it may take for ever.
    looks: Arc<Semaphore>,
    /// A look took longer than [`LOOK_TIME`]; nobody waits until it has ended.
    stuck: AtomicBool,
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
        f.debug_tuple("Gate").field(&self.followed.path).finish()
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
        let doorkeeper = Doorkeeper::new().map_err(|error| ConfigError::new(error).not_yet())?;
        let followed = Followed {
            path: path.to_owned(),
            state: Mutex::new(State {
                bucket: bucket(&active.settings),
                active: Arc::new(active),
                prints,
                broken: None,
            }),
            looks: Arc::new(Semaphore::new(1)),
            stuck: AtomicBool::new(false),
        };
        Ok(Self {
            followed: Arc::new(followed),
            doorkeeper,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.followed.state()
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
    pub(super) async fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.current().await.tls.clone()
    }

    /// Takes up what has changed and is good, without being waited for.
    pub(super) fn look(&self) {
        let followed = Arc::clone(&self.followed);
        tokio::spawn(followed.look());
    }

    /// What is in force after a look at the files, on a thread that may wait
    /// for them. A few `stat` calls, so that it can be asked for every
    /// connection and request.
    async fn current(&self) -> Arc<Active> {
        Arc::clone(&self.followed).look().await;
        Arc::clone(&self.state().active)
    }

    /// Whether a request with these headers from this address is let in.
    pub(super) async fn ask(&self, headers: &HeaderMap, client: IpAddr) -> Entry {
        let active = self.current().await;
        if let Some(bucket) = &mut self.state().bucket
            && !bucket.allow(Instant::now())
        {
            return Entry::TooMany;
        }
        if active.settings.users.is_empty() {
            return Entry::Open;
        }
        let users = &active.settings.users;
        match self.doorkeeper.check(headers, users, client).await {
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

impl Followed {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn look(self: Arc<Self>) {
        let looks = Arc::clone(&self.looks);
        let stuck = self.stuck.load(Ordering::Relaxed);
        let this = Arc::clone(&self);
        let look = async move {
            let permit = if stuck {
                looks.try_acquire_owned().ok()
            } else {
                looks.acquire_owned().await.ok()
            };
            let Some(permit) = permit else { return };
            let look = tokio::task::spawn_blocking(move || {
                this.look_now();
                this.stuck.store(false, Ordering::Relaxed);
                drop(permit);
            });
            // A panic there has ended the process.
            let _ = look.await;
        };
        if tokio::time::timeout(LOOK_TIME, look).await.is_err() {
            self.stuck.store(true, Ordering::Relaxed);
            log::warn!(
                "{}: the file or one that it names takes more than {LOOK_TIME:?} to look at; \
                 keeping the old web configuration meanwhile",
                self.path.display()
            );
        }
    }

    /// By one thread at a time. The state is not locked while files are read.
    fn look_now(&self) {
        let (retry, prints, before) = {
            let state = self.state();
            let retry = state.broken.is_some_and(|since| since.elapsed() >= RETRY);
            (retry, state.prints.clone(), Arc::clone(&state.active))
        };
        if retry || !prints.iter().all(Print::is_current) {
            self.reload(&before);
        }
    }

    fn reload(&self, before: &Arc<Active>) {
        let mut prints = Vec::new();
        let loaded = load(&self.path, &mut prints).and_then(|active| {
            if active.settings.is_blank && !before.settings.is_blank {
                // Emptied to be written anew, or for want of space: nobody's
                // wish to open the door. `{}` is.
                return Err(ConfigError::new(format!(
                    "{}: the file is empty; write {{}} for no settings",
                    self.path.display()
                )));
            }
            if active.tls.is_some() != before.tls.is_some() {
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
                let mut state = self.state();
                let rate = state.bucket.as_ref().map(Bucket::rate);
                if rate != active.settings.rate {
                    state.bucket = bucket(&active.settings);
                }
                state.active = Arc::new(active);
                state.broken = None;
                state.prints = prints;
            }
            Err(error) => {
                let renewed = renew(before, &mut prints);
                let mut state = self.state();
                if state.broken.replace(Instant::now()).is_some() {
                    log::debug!("{error}; still keeping the old web configuration");
                } else {
                    log::error!("{error}; keeping the old web configuration");
                }
                if let Some(active) = renewed {
                    state.active = Arc::new(active);
                }
                state.prints = prints;
            }
        }
    }
}

/// Reads again the certificates and keys of settings that stay in force: they
/// are renewed whatever happens to the file that names them.
fn renew(active: &Active, prints: &mut Vec<Print>) -> Option<Active> {
    let tls = active.settings.tls.as_ref()?;
    prints.extend(tls.files().map(Print::of));
    // What does not fit is not in force either way.
    let (config, remarks) = tls.load(active.settings.http2).ok()?;
    Some(Active {
        settings: active.settings.clone(),
        tls: Some(config),
        remarks,
    })
}

fn bucket(settings: &Settings) -> Option<Bucket> {
    let rate = settings.rate?;
    Some(Bucket::new(rate, Instant::now()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As while the files' own file system does not answer.
    #[tokio::test(start_paused = true)]
    async fn a_look_that_never_ends_delays_one_request() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.yml");
        std::fs::write(&path, "{}").unwrap();
        let gate = Gate::open(&path).unwrap();
        let look = Arc::clone(&gate.followed.looks).acquire_owned().await;
        let ask = async || {
            let asked = tokio::time::Instant::now();
            assert_eq!(
                gate.ask(&HeaderMap::new(), std::net::Ipv4Addr::LOCALHOST.into())
                    .await,
                Entry::Open
            );
            asked.elapsed()
        };
        assert_eq!(ask().await.as_secs(), LOOK_TIME.as_secs());
        assert_eq!(ask().await, Duration::ZERO);
        // It has ended: what changed meanwhile is seen.
        drop(look);
        tokio::time::resume();
        std::fs::write(&path, "basic_auth_users: {amy: $2b$04$}").unwrap();
        ask().await;
        assert!(gate.state().broken.is_some());
    }
}
