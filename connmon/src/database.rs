//! Sees that the database file changed and opens the new one.
//!
//! The file is watched by its identity, once a second, rather than by
//! inotify: that sees a rename, a rewrite in place and the double symlink
//! swap of a Kubernetes volume alike, on every file system, and needs no
//! watch on directories that come and go.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use connmon_core::geo::Database;
use connmon_host::is_resource_exhausted;
use connmon_http::read_file::read_file;
use connmon_http::{ConfigError, is_state_of_host};

/// Largest file that is read, bytes: several times the country and ASN
/// databases that there are. While one is reloaded two are in memory, and the
/// container limit that is shipped has to hold them
/// (`tests/geo.rs two_largest_databases_fit_the_shipped_limit`).
pub const MAX_DATABASE_BYTES: u64 = 64 << 20;

/// Longest time the check of one file may take. The bundled database takes
/// some tens of milliseconds.
const MAX_CHECK: Duration = Duration::from_secs(30);

/// Reads, checks and opens a file.
///
/// # Errors
/// When it cannot be read, is damaged, or names no countries.
pub fn open(path: &Path) -> Result<Database, DatabaseError> {
    let refuse = |problem: &dyn fmt::Display| DatabaseError {
        text: format!("country database {}: {problem}", path.display()),
        exhausted: false,
        os_error: None,
    };
    let bytes = read_file(path, MAX_DATABASE_BYTES).map_err(|error| match error.kind() {
        std::io::ErrorKind::FileTooLarge => refuse(&format_args!(
            "{error}; use one without cities, country databases are smaller"
        )),
        _ => DatabaseError {
            exhausted: is_resource_exhausted(&error),
            os_error: error.raw_os_error(),
            ..refuse(&error)
        },
    })?;
    let deadline = Instant::now() + MAX_CHECK;
    Database::from_bytes(bytes, || Instant::now() <= deadline).map_err(|problem| refuse(&problem))
}

/// Watches one file. The caller polls about once a second, from a thread
/// that may read files, and publishes what comes out.
#[derive(Debug)]
pub struct Reloader {
    path: PathBuf,
    /// What the database in use, or the last one refused, was read from.
    seen: Option<Identity>,
    /// A change seen at the last poll, to be read once it stays the same.
    pending: Option<Option<Identity>>,
    /// What was seen last could not be read for want of something that says
    /// nothing about it, and is to be read again.
    again: bool,
    ok: u64,
    failed: u64,
}

/// What a poll led to.
#[derive(Debug)]
pub enum Outcome {
    /// A new database, opened and checked. Everything located from now on is
    /// to be located by it.
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
        // Identity first: a change while reading is then seen as a change.
        let seen = Identity::of(path);
        let database = open(path)?;
        let reloader = Self {
            path: path.to_owned(),
            seen,
            pending: None,
            again: false,
            ok: 0,
            failed: 0,
        };
        Ok((reloader, database))
    }

    /// Reads the file again if it is another one than before and was the same
    /// at two polls in a row (a writer may be half-way through it). With
    /// `force` (SIGHUP) at once and in any case. One that could not be read for
    /// want of descriptors or memory is tried again at every poll, and counts
    /// as refused once.
    pub fn poll(&mut self, force: bool) -> Option<Outcome> {
        let now = Identity::of(&self.path);
        let again = self.again && now == self.seen;
        if !force && !again {
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
        self.again = false;
        Some(match open(&self.path) {
            Ok(database) => {
                self.ok += 1;
                log::info!(
                    "country database {} reloaded: {}, built {}",
                    self.path.display(),
                    database.database_type(),
                    database.build_timestamp()
                );
                Outcome::Replaced(database)
            }
            Err(error) if error.is_resource_exhausted() && again && !force => {
                self.again = true;
                return None;
            }
            Err(error) => {
                self.again = error.is_resource_exhausted();
                self.failed += 1;
                log::error!("{error}; the one loaded before stays in use");
                Outcome::Refused(error)
            }
        })
    }

    /// Successful and refused reloads, for `connmon_geoip_reloads_total`.
    pub fn counts(&self) -> (u64, u64) {
        (self.ok, self.failed)
    }
}

/// Changes whenever the content behind the path may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    /// Of the file at the end of all symlinks; `None` when there is none.
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

/// A database that cannot be used: which, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseError {
    text: String,
    exhausted: bool,
    /// With which the kernel refused to open or read the file.
    os_error: Option<i32>,
}

impl DatabaseError {
    /// Whether the agent ran out of descriptors or memory, which says nothing
    /// about the file.
    pub fn is_resource_exhausted(&self) -> bool {
        self.exhausted
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
