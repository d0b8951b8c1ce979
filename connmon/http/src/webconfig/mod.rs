//! `--web.config.file`: the web configuration of the Prometheus
//! exporter-toolkit, with its keys, defaults and verdicts
//! (prometheus/exporter-toolkit, `web/tls_config.go`, `web/handler.go`).
//!
//! [`parse`] judges the text alone, [`check`] also the files that it names.
//! The server asks `WebConfig`, which follows changed files and keeps the last
//! good settings when the new ones are bad. docs/web.md lists where this
//! differs from the toolkit.

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
pub(crate) use self::users::Access;
use self::users::BasicAuth;
use crate::read_file::read_file;
use crate::yaml;
use crate::{ConfigError, is_state_of_host};

/// Largest web configuration, bytes.
const MAX_BYTES: u64 = 1 << 20;

/// A broken configuration is read again after this time though nothing has
/// changed: there may have been no file descriptor left to read it with.
const RETRY: Duration = Duration::from_secs(1);

/// How long a connection or request waits while files are looked at. Their
/// file system may not answer.
const LOOK_TIME: Duration = Duration::from_secs(1);

/// Judges the text of a web configuration at `path`, whose directory
/// relative paths start from; no file is opened. Total: any text gives
/// settings or an error that names the line.
pub fn parse(text: &str, path: &Path) -> Result<Settings, ConfigError> {
    let directory = path.parent().unwrap_or(Path::new(""));
    Settings::parse(text, directory).map_err(|problem| problem.of(path))
}

/// Judges a web configuration with all the files it names. Returns what is
/// accepted and should be changed.
pub fn check(path: &Path) -> Result<Vec<String>, ConfigError> {
    let active = load(path, &mut Vec::new())?;
    let remark = |remark| format!("{}: {remark}", path.display());
    Ok(active.remarks.into_iter().map(remark).collect())
}

/// Settings with the certificates and keys that they name.
struct Active {
    settings: Settings,
    tls: Option<Arc<ServerConfig>>,
    remarks: Vec<String>,
}

impl Active {
    fn new(path: &Path, settings: Settings) -> Result<Self, ConfigError> {
        let mut remarks = settings.remarks.clone();
        let loaded = settings.tls.as_ref().map(|tls| tls.load()).transpose();
        let tls = loaded.map_err(|problem| problem.of(path))?;
        let tls = tls.map(|(tls, more)| {
            remarks.extend(more);
            tls
        });
        Ok(Self {
            settings,
            tls,
            remarks,
        })
    }

    fn log_remarks(&self, path: &Path) {
        for remark in &self.remarks {
            log::warn!("{}: {remark}", path.display());
        }
    }

    fn bucket(&self) -> Option<Bucket> {
        let rate = self.settings.rate?;
        Some(Bucket::new(rate, Instant::now()))
    }
}

/// Reads and judges everything. `files` gets the identity of each file, taken
/// before it is read, so that a change meanwhile is noticed next time.
fn load(path: &Path, files: &mut Vec<FileIdentity>) -> Result<Active, ConfigError> {
    files.push(FileIdentity::of(path));
    let bytes = read_file(path, MAX_BYTES).map_err(|error| {
        ConfigError::new(format_args!("{}: cannot read: {error}", path.display()))
            .not_yet_if(is_state_of_host(error.raw_os_error()))
    })?;
    let text = yaml::utf8(bytes).map_err(|problem| problem.of(path))?;
    let settings = parse(&text, path)?;
    files.extend(identities(&settings));
    Active::new(path, settings)
}

/// Distinguishes two states of a file without reading it.
#[derive(Clone, PartialEq)]
struct FileIdentity {
    path: PathBuf,
    /// Device, inode, size, mtime and ctime; `None` when there is no file.
    state: Option<([u64; 3], [i64; 4])>,
}

impl FileIdentity {
    fn of(path: &Path) -> Self {
        let state = std::fs::metadata(path).ok().map(|it| {
            let times = [it.mtime(), it.mtime_nsec(), it.ctime(), it.ctime_nsec()];
            ([it.dev(), it.ino(), it.size()], times)
        });
        Self {
            path: path.to_owned(),
            state,
        }
    }
}

/// Of the files that the settings name.
fn identities(settings: &Settings) -> impl Iterator<Item = FileIdentity> {
    let files = settings.tls.iter().flat_map(|tls| tls.files());
    files.map(FileIdentity::of)
}

/// The web configuration in force, kept up to date as its files change.
pub(crate) struct WebConfig {
    path: PathBuf,
    state: Mutex<State>,
    basic_auth: BasicAuth,
    /// Held by the thread that looks at the files, which may hang.
    looking: Arc<Semaphore>,
    /// A look has taken longer than [`LOOK_TIME`]; nobody waits until it ends.
    stuck: AtomicBool,
}

struct State {
    active: Arc<Active>,
    /// Every file involved, as it was when it was last judged.
    files: Vec<FileIdentity>,
    bucket: Option<Bucket>,
    /// When the last attempt was, if it failed. Of several that fail one after
    /// the other, the first is logged as an error.
    broken: Option<Instant>,
}

impl fmt::Debug for WebConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WebConfig").field(&self.path).finish()
    }
}

impl WebConfig {
    /// Reads the configuration and all it names.
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>, ConfigError> {
        let mut files = Vec::new();
        let active = load(path, &mut files)?;
        active.log_remarks(path);
        Ok(Arc::new(Self {
            path: path.to_owned(),
            state: Mutex::new(State {
                bucket: active.bucket(),
                active: Arc::new(active),
                files,
                broken: None,
            }),
            basic_auth: BasicAuth::new().map_err(|error| ConfigError::new(error).not_yet())?,
            looking: Arc::new(Semaphore::new(1)),
            stuck: AtomicBool::new(false),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The files to be readable for as long as the server runs.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let state = self.state();
        state.files.iter().map(|file| file.path.clone()).collect()
    }

    /// Whether connections are TLS; does not change while running.
    pub(crate) fn is_tls(&self) -> bool {
        self.state().active.tls.is_some()
    }

    /// The TLS configuration of a connection that begins now.
    pub(crate) async fn tls(self: &Arc<Self>) -> Option<Arc<ServerConfig>> {
        self.current().await.tls.clone()
    }

    async fn current(self: &Arc<Self>) -> Arc<Active> {
        Arc::clone(self).refresh().await;
        Arc::clone(&self.state().active)
    }

    /// Whether a request with these headers from this address is allowed.
    pub(crate) async fn access(self: &Arc<Self>, headers: &HeaderMap, client: IpAddr) -> Access {
        let active = self.current().await;
        if let Some(bucket) = &mut self.state().bucket
            && !bucket.allow(Instant::now())
        {
            return Access::RateLimited;
        }
        let users = &active.settings.users;
        if users.is_empty() {
            return Access::Allowed;
        }
        self.basic_auth.check(headers, users, client).await
    }

    /// Puts the configured headers in place of the built-in ones.
    pub(crate) fn set_headers(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.state().active.settings.headers {
            headers.remove(name);
            if !value.is_empty() {
                headers.insert(name, value.clone());
            }
        }
    }

    /// Takes up changed files, on a thread that may wait for them. Without a
    /// change it costs a few `stat` calls: cheap enough for every request.
    pub(crate) async fn refresh(self: Arc<Self>) {
        let this = Arc::clone(&self);
        let look = async move {
            let looking = Arc::clone(&this.looking);
            let permit = if this.stuck.load(Ordering::Relaxed) {
                looking.try_acquire_owned().ok()
            } else {
                looking.acquire_owned().await.ok()
            };
            let Some(permit) = permit else { return };
            let look = tokio::task::spawn_blocking(move || {
                this.reload_if_changed();
                this.stuck.store(false, Ordering::Relaxed);
                drop(permit);
            });
            // A panic there has ended the process.
            let _ = look.await;
        };
        if tokio::time::timeout(LOOK_TIME, look).await.is_err() {
            self.stuck.store(true, Ordering::Relaxed);
            log::warn!(
                "{}: no answer within {LOOK_TIME:?} from the file system of this file or of one \
                 that it names; keeping the old web configuration meanwhile",
                self.path.display()
            );
        }
    }

    /// By one thread at a time. The state is not locked while files are read.
    fn reload_if_changed(&self) {
        let (retry, files, before) = {
            let state = self.state();
            let retry = state.broken.is_some_and(|at| at.elapsed() >= RETRY);
            (retry, state.files.clone(), Arc::clone(&state.active))
        };
        if retry
            || files
                .iter()
                .any(|file| FileIdentity::of(&file.path) != *file)
        {
            self.reload(&before);
        }
    }

    fn reload(&self, before: &Active) {
        let path = self.path.display();
        let mut files = Vec::new();
        let loaded = load(&self.path, &mut files).and_then(|active| {
            let refuse = |why| Err(ConfigError::at(&path, why));
            if active.settings.is_blank && !before.settings.is_blank {
                // The file may be empty because it is being written, or
                // because the disk is full: no reason to drop the passwords.
                return refuse("the file is empty; write {} for no settings");
            }
            if active.tls.is_some() != before.tls.is_some() {
                return refuse("TLS cannot be switched on or off while running; restart connmon");
            }
            Ok(active)
        });
        match loaded {
            Ok(active) => {
                active.log_remarks(&self.path);
                log::info!("{path}: changed web configuration in force");
                let mut state = self.state();
                if state.bucket.as_ref().map(|bucket| bucket.rate) != active.settings.rate {
                    state.bucket = active.bucket();
                }
                state.active = Arc::new(active);
                state.broken = None;
                state.files = files;
            }
            Err(error) => {
                // Certificates are renewed whatever happens to the file that
                // names them; if they do not fit, the old ones stay.
                files.extend(identities(&before.settings));
                let renewed = Active::new(&self.path, before.settings.clone());
                let mut state = self.state();
                if state.broken.replace(Instant::now()).is_some() {
                    log::debug!("{error}; still keeping the old web configuration");
                } else {
                    log::error!("{error}; keeping the old web configuration");
                }
                if let Ok(active) = renewed {
                    state.active = Arc::new(active);
                }
                state.files = files;
            }
        }
    }
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
        let config = WebConfig::open(&path).unwrap();
        let look = Arc::clone(&config.looking).acquire_owned().await;
        let ask = async || {
            let asked = tokio::time::Instant::now();
            assert_eq!(
                config
                    .access(&HeaderMap::new(), std::net::Ipv4Addr::LOCALHOST.into())
                    .await,
                Access::Allowed
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
        assert!(config.state().broken.is_some());
    }
}
