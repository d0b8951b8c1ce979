//! What is wrong with a configuration: where, which value, what to do.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::text::printable;

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

/// A refused configuration. Ends the process with exit code 2. Keys, values
/// and paths in it are printable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(String);

impl ConfigError {
    /// An error that already says where.
    pub fn new(message: impl fmt::Display) -> Self {
        Self(printable(message))
    }

    /// A bad value at `origin`.
    pub fn at(origin: &Origin, problem: impl fmt::Display) -> Self {
        Self::new(format_args!("{origin}: {problem}"))
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}
