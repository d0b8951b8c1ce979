//! Why there is no tracing.

use std::error::Error;
use std::fmt;

use connmon_core::probe::{AttachFailure, Method, Rung, Stage};

use super::ladder::{chain, errno};
use super::{Diagnosis, HostFacts};

/// Tracing cannot start. Displays as one sentence: cause and remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachError {
    /// What failed, one for each method that was tried.
    pub failures: Vec<AttachFailure>,
    /// What it means on this host.
    pub diagnosis: Diagnosis,
}

impl fmt::Display for AttachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.diagnosis.fmt(f)
    }
}

impl Error for AttachError {}

impl AttachError {
    /// `--netns host` on a kernel whose events carry no namespace.
    pub(super) fn no_namespaces(reason: &str) -> Self {
        Self {
            failures: vec![failure(Stage::Btf, None, reason.to_owned())],
            diagnosis: Diagnosis {
                cause: format!(
                    "--netns host: without the kernel's BTF, events carry no network namespace ({reason})"
                ),
                remedy: "run a kernel with CONFIG_DEBUG_INFO_BTF, or leave --netns at all".into(),
            },
        }
    }

    /// The object was not read, or a map of it not created or mapped.
    pub(super) fn map(what: &str, error: &(dyn Error + 'static), ring_bytes: u32) -> Self {
        let message = format!("{what}: {}", chain(error));
        Self::diagnosed(vec![failure(Stage::Map, errno(error), message)], ring_bytes)
    }

    /// The state program was attached by no method.
    pub(super) fn state(rung: Rung, ring_bytes: u32) -> Self {
        Self::diagnosed(rung.failures, ring_bytes)
    }

    fn diagnosed(failures: Vec<AttachFailure>, ring_bytes: u32) -> Self {
        let diagnosis = HostFacts::read().diagnose(&failures, ring_bytes);
        Self {
            failures,
            diagnosis,
        }
    }
}

fn failure(stage: Stage, errno: Option<i32>, message: String) -> AttachFailure {
    AttachFailure {
        errno,
        ..AttachFailure::new(Method::None, stage, message)
    }
}
