//! Reads the country database, and reloads it when its file changes.
//!
//! The file's identity is compared once a second instead of using inotify:
//! that finds a rename, a rewrite in place and the double symlink swap of a
//! Kubernetes volume alike, on every file system, and needs no watch on
//! directories that come and go.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use connmon_core::geo::Database;
use connmon_host::is_resource_exhausted;
use connmon_http::read_file::read_file;
use connmon_http::{ConfigError, is_state_of_host};

/// Largest file that is read, bytes: several times the country and ASN
/// databases that exist. While one is reloaded two are in memory, and the
/// container limit that is shipped has to hold them
/// (`tests/geo.rs two_largest_databases_fit_the_shipped_limit`).
pub const MAX_DATABASE_BYTES: u64 = 64 << 20;

/// Longest time that the check of one file may take. The embedded database
/// takes some tens of milliseconds.
const MAX_CHECK: Duration = Duration::from_secs(30);

/// Reads, checks and opens a file.
///
/// # Errors
/// When it cannot be read, is damaged, or names no countries.
pub fn open(path: &Path) -> Result<Database, DatabaseError> {
    let refuse = |problem: &dyn fmt::Display, os_error| DatabaseError {
        text: format!("country database {}: {problem}", path.display()),
        os_error,
    };
    let bytes = read_file(path, MAX_DATABASE_BYTES).map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::FileTooLarge => "; use a database of countries without cities",
            _ => "",
        };
        refuse(
            &format_args!("cannot read: {error}{remedy}"),
            error.raw_os_error(),
        )
    })?;
    let deadline = Instant::now() + MAX_CHECK;
    let database = Database::from_bytes(bytes, || Instant::now() <= deadline);
    database.map_err(|problem| refuse(&problem, None))
}

/// Reloads one file. The caller polls about once a second, from a thread
/// that may read files, and publishes what comes out.
#[derive(Debug)]
pub struct Reloader {
    path: PathBuf,
    /// Of the database in use, or the last one refused.
    seen: Identity,
    /// A change found at the last poll, to be read once it stays the same.
    pending: Option<Identity>,
    /// Whether the last read ran out of descriptors or memory: it is then retried at every poll.
    retry: bool,
    ok: u64,
    failed: u64,
}

/// What a poll led to.
#[derive(Debug)]
pub enum Outcome {
    /// A new database, opened and checked.
    Replaced(Database),
    /// The file changed and cannot be used; the old database stays.
    Refused(DatabaseError),
}

impl Reloader {
    /// Opens the file for the first time.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn open(path: &Path) -> Result<(Self, Database), DatabaseError> {
        let reloader = Self {
            path: path.to_owned(),
            // Before the file: so a change during the read is found later.
            seen: identity(path),
            pending: None,
            retry: false,
            ok: 0,
            failed: 0,
        };
        Ok((reloader, open(path)?))
    }

    /// Reads the file if it changed and was the same at two polls in a row (a
    /// writer may be half-way through it). With `force` (SIGHUP) at once and
    /// in any case. A read for which descriptors or memory run out is retried
    /// at every poll, and counts as refused once.
    pub fn poll(&mut self, force: bool) -> Option<Outcome> {
        let now = identity(&self.path);
        let retried = self.retry && now == self.seen;
        if !force && !retried {
            if now == self.seen {
                self.pending = None;
                return None;
            }
            if self.pending.replace(now) != Some(now) {
                return None;
            }
        }
        self.pending = None;
        self.seen = now;
        self.retry = false;
        match open(&self.path) {
            Ok(database) => {
                self.ok += 1;
                log::info!(
                    "country database {} reloaded: {}, built {}",
                    self.path.display(),
                    database.database_type(),
                    database.build_timestamp()
                );
                Some(Outcome::Replaced(database))
            }
            Err(error) => {
                self.retry = error.is_resource_exhausted();
                if self.retry && retried && !force {
                    return None;
                }
                self.failed += 1;
                log::error!("{error}; the one loaded before stays in use");
                Some(Outcome::Refused(error))
            }
        }
    }

    /// Successful and refused reloads, for `connmon_geoip_reloads_total`.
    pub fn counts(&self) -> (u64, u64) {
        (self.ok, self.failed)
    }
}

/// Changes whenever the content behind the path may have changed: device,
/// inode and size, mtime and ctime of the file at the end of all symlinks;
/// `None` when there is none.
type Identity = Option<([u64; 3], [i64; 4])>;

fn identity(path: &Path) -> Identity {
    let file = std::fs::metadata(path).ok()?;
    let times = [
        file.mtime(),
        file.mtime_nsec(),
        file.ctime(),
        file.ctime_nsec(),
    ];
    Some(([file.dev(), file.ino(), file.len()], times))
}

/// A database that cannot be used: which, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseError {
    text: String,
    /// With which the kernel refused to open or read the file.
    os_error: Option<i32>,
}

impl DatabaseError {
    /// Whether the agent ran out of descriptors or memory: the file may be
    /// valid.
    pub fn is_resource_exhausted(&self) -> bool {
        let error = self.os_error.map(io::Error::from_raw_os_error);
        error.is_some_and(|error| is_resource_exhausted(&error))
    }
}

impl fmt::Display for DatabaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for DatabaseError {}

impl From<DatabaseError> for ConfigError {
    fn from(error: DatabaseError) -> Self {
        Self::new(&error.text).not_yet_if(is_state_of_host(error.os_error))
    }
}
