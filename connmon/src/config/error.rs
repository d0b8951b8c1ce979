//! Where a value of the configuration was written.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use connmon_http::{ConfigError, is_state_of_host};

use crate::database::DatabaseError;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A flag, by its key.
    Flag(&'static str),
    /// An environment variable, by its name.
    Variable(String),
    /// A line of the configuration file.
    File {
        /// The file.
        path: Arc<PathBuf>,
        /// 1-based.
        line: usize,
        /// The key as written.
        key: String,
    },
    /// Nowhere: the built-in default.
    Default(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(key) => write!(f, "--{key}"),
            Self::Variable(name) => f.write_str(name),
            Self::File { path, line, key } => write!(f, "{}:{line}: {key}", path.display()),
            Self::Default(key) => write!(f, "--{key} (default)"),
        }
    }
}

impl From<DatabaseError> for ConfigError {
    fn from(error: DatabaseError) -> Self {
        Self::new(error.to_string()).not_yet_if(is_state_of_host(error.os_error()))
    }
}
