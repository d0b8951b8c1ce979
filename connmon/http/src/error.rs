//! What is wrong with a configuration: where, which value, what to do.

use std::fmt;

use connmon_core::text::printable;

/// A refused configuration. Ends the process with exit code 2 where the text
/// is wrong, with 1 where the text may be right later ([`Self::not_yet`]).
/// Keys, values and paths in it are printable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    message: String,
    not_yet: bool,
}

impl ConfigError {
    /// An error that already names the place.
    pub fn new(message: impl fmt::Display) -> Self {
        Self {
            message: printable(message),
            not_yet: false,
        }
    }

    /// A bad value at `origin`: where it was written.
    pub fn at(origin: impl fmt::Display, problem: impl fmt::Display) -> Self {
        Self::new(format_args!("{origin}: {problem}"))
    }

    /// The same error with `origin` before it.
    #[must_use]
    pub fn under(self, origin: impl fmt::Display) -> Self {
        Self {
            not_yet: self.not_yet,
            ..Self::at(origin, self)
        }
    }

    /// Marks an error about something that does not exist yet or cannot be
    /// used yet: a file, a host name, an interface.
    #[must_use]
    pub fn not_yet(self) -> Self {
        self.not_yet_if(true)
    }

    /// [`Self::not_yet`], where the condition holds.
    #[must_use]
    pub fn not_yet_if(self, condition: bool) -> Self {
        Self {
            not_yet: self.not_yet || condition,
            ..self
        }
    }

    /// Whether the same text may be accepted later.
    pub fn is_not_yet(&self) -> bool {
        self.not_yet
    }
}

/// Whether a file could not be read because of the state of the host (no such
/// file, no permission), which can change, and not because of the path or of
/// what the file is. `errno` is `None` where the kernel reported no error.
pub fn is_state_of_host(errno: Option<i32>) -> bool {
    !matches!(errno, None | Some(libc::EISDIR | libc::ENAMETOOLONG))
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ConfigError {}

impl From<&str> for ConfigError {
    fn from(message: &str) -> Self {
        Self::new(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_can_change_is_not_wrong() {
        for (errno, not_yet) in [
            (Some(libc::ENOENT), true),
            (Some(libc::ENOTDIR), true),
            (Some(libc::EACCES), true),
            (Some(libc::EIO), true),
            (Some(libc::EMFILE), true),
            (Some(libc::EISDIR), false),
            (Some(libc::ENAMETOOLONG), false),
            // Read, and too large or not a regular file.
            (None, false),
        ] {
            assert_eq!(is_state_of_host(errno), not_yet, "{errno:?}");
        }
        // Kept when the place is named.
        let error = ConfigError::new("missing").not_yet();
        let error = error.under("--geoip.database");
        assert!(error.is_not_yet());
        assert_eq!(error.to_string(), "--geoip.database: missing");
    }
}
