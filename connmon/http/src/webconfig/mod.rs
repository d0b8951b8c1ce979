//! `--web.config.file`: the web configuration of the Prometheus
//! exporter-toolkit, with its keys, defaults and verdicts
//! (prometheus/exporter-toolkit, `web/tls_config.go`, `web/handler.go`).
//!
//! [`parse`] checks the text alone, [`check`] also the files that it names.
//! The server asks `WebConfig`, which follows changed files and keeps the last
//! good settings when the new ones are bad. docs/web.md lists where this
//! differs from the toolkit.

mod clients;
mod rate;
mod settings;
mod tls;
mod users;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
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
use crate::{ConfigError, is_state_of_host, lock};

/// Largest web configuration, bytes.
const MAX_BYTES: u64 = 1 << 20;

/// A broken configuration is read once more after this time though nothing has
/// changed: there may have been no file descriptor left to read it with.
const RETRY: Duration = Duration::from_secs(1);

/// How long a connection or request waits while files are looked at. Their
/// file system may not answer.
const LOOK_TIME: Duration = Duration::from_secs(1);

/// Checks the text of a web configuration at `path`, whose directory
/// relative paths start from; no file is opened. Total: any text gives
/// settings or an error that names the line.
pub fn parse(text: &str, path: &Path) -> Result<Settings, ConfigError> {
    let directory = path.parent().unwrap_or(Path::new(""));
    Settings::parse(text, directory).map_err(|problem| problem.of(path))
}

/// Checks a web configuration with all the files it names. Returns what is
/// accepted and should be changed.
pub fn check(path: &Path) -> Result<Vec<String>, ConfigError> {
    let settings = load(path, &mut Files::new())?;
    let remarks = settings.remarks.iter();
    Ok(remarks
        .map(|remark| format!("{}: {remark}", path.display()))
        .collect())
}

/// The files involved, each with its identity when it was last read.
type Files = BTreeMap<PathBuf, FileIdentity>;

/// Device, inode, size; mtime and ctime. A changed file has another identity.
/// `None` when there is no file.
type FileIdentity = Option<([u64; 3], [i64; 4])>;

fn identity(path: &Path) -> FileIdentity {
    let it = std::fs::metadata(path).ok()?;
    let times = [it.mtime(), it.mtime_nsec(), it.ctime(), it.ctime_nsec()];
    Some(([it.dev(), it.ino(), it.size()], times))
}

/// Of the files that the settings name.
fn identities(settings: &Settings) -> impl Iterator<Item = (PathBuf, FileIdentity)> {
    settings.files().map(|file| (file.clone(), identity(&file)))
}

/// Reads and checks everything. Identities are taken before a file is read, so
/// that a change meanwhile is noticed next time.
fn load(path: &Path, files: &mut Files) -> Result<Settings, ConfigError> {
    files.insert(path.to_owned(), identity(path));
    let bytes = read_file(path, MAX_BYTES).map_err(|error| {
        ConfigError::new(format_args!("{}: cannot read: {error}", path.display()))
            .not_yet_if(is_state_of_host(error.raw_os_error()))
    })?;
    let text = yaml::utf8(bytes).map_err(|problem| problem.of(path))?;
    let mut settings = parse(&text, path)?;
    files.extend(identities(&settings));
    let mut remarks = Vec::new();
    let loaded = settings.load(&mut remarks);
    loaded.map_err(|problem| problem.of(path))?;
    settings.remarks.extend(remarks);
    Ok(settings)
}

fn log_remarks(path: &Path, settings: &Settings) {
    for remark in &settings.remarks {
        log::warn!("{}: {remark}", path.display());
    }
}

fn bucket(settings: &Settings) -> Option<Bucket> {
    let rate = settings.rate?;
    Some(Bucket::new(rate, Instant::now()))
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
    settings: Arc<Settings>,
    files: Files,
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
        let mut files = Files::new();
        let settings = load(path, &mut files)?;
        log_remarks(path, &settings);
        Ok(Arc::new(Self {
            path: path.to_owned(),
            state: Mutex::new(State {
                bucket: bucket(&settings),
                settings: Arc::new(settings),
                files,
                broken: None,
            }),
            basic_auth: BasicAuth::new().map_err(|error| ConfigError::new(error).not_yet())?,
            looking: Arc::new(Semaphore::new(1)),
            stuck: AtomicBool::new(false),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The files to be readable for as long as the server runs.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        self.state().files.keys().cloned().collect()
    }

    /// Whether connections are TLS; does not change while running.
    pub(crate) fn is_tls(&self) -> bool {
        self.state().settings.tls_config.is_some()
    }

    /// The TLS configuration of a connection that begins now.
    pub(crate) async fn tls(self: &Arc<Self>) -> Option<Arc<ServerConfig>> {
        self.current().await.tls_config.clone()
    }

    async fn current(self: &Arc<Self>) -> Arc<Settings> {
        Arc::clone(self).refresh().await;
        Arc::clone(&self.state().settings)
    }

    /// Whether a request with these headers from this address is allowed.
    pub(crate) async fn access(self: &Arc<Self>, headers: &HeaderMap, client: IpAddr) -> Access {
        let settings = self.current().await;
        if let Some(bucket) = &mut self.state().bucket
            && !bucket.allow(Instant::now())
        {
            return Access::RateLimited;
        }
        if settings.users.is_empty() {
            return Access::Allowed;
        }
        let users = &settings.users;
        self.basic_auth.check(headers, users, client).await
    }

    /// Puts the configured headers in place of the built-in ones.
    pub(crate) fn set_headers(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.state().settings.headers {
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
            (retry, state.files.clone(), Arc::clone(&state.settings))
        };
        let changed = |(path, before): (&PathBuf, &_)| identity(path) != *before;
        if retry || files.iter().any(changed) {
            self.reload(&before);
        }
    }

    fn reload(&self, before: &Settings) {
        let path = self.path.display();
        let mut files = Files::new();
        let loaded = load(&self.path, &mut files).and_then(|settings| {
            let refuse = |why| Err(ConfigError::at(&path, why));
            if settings.is_blank && !before.is_blank {
                // The file may be empty because it is being written, or
                // because the disk is full: no reason to drop the passwords.
                return refuse("the file is empty; write {} for no settings");
            }
            if settings.tls_config.is_some() != before.tls_config.is_some() {
                return refuse("TLS cannot be switched on or off while running; restart connmon");
            }
            Ok(settings)
        });
        let mut renewed = before.clone();
        if loaded.is_err() {
            // Certificates are renewed whatever happens to the file that names
            // them; if they do not fit, the old ones stay.
            files.extend(identities(&renewed));
            let _ = renewed.load(&mut Vec::new());
        }
        let mut state = self.state();
        state.files = files;
        match loaded {
            Ok(settings) => {
                log_remarks(&self.path, &settings);
                log::info!("{path}: changed web configuration in force");
                if state.bucket.as_ref().map(|bucket| bucket.rate) != settings.rate {
                    state.bucket = bucket(&settings);
                }
                state.settings = Arc::new(settings);
                state.broken = None;
            }
            Err(error) => {
                if state.broken.replace(Instant::now()).is_some() {
                    log::debug!("{error}; still keeping the old web configuration");
                } else {
                    log::error!("{error}; keeping the old web configuration");
                }
                state.settings = Arc::new(renewed);
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
