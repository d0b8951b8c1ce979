//! `--config.check`: what only shows when files are opened.

use super::{Config, ConfigError, Loaded};
use crate::geo::Database;

/// Opens everything the configuration points at, and throws it away again.
/// What a stronger source overrides is checked as well: it is in effect the
/// day that source is gone.
///
/// # Errors
/// The first file that cannot be used, by name and by where that stands.
///
/// Returns what is accepted and should be changed.
pub fn check(loaded: &Loaded) -> Result<Vec<String>, ConfigError> {
    let configs = std::iter::once(&loaded.config).chain(&loaded.alone);
    let mut remarks = Vec::new();
    for config in configs {
        remarks.extend(files(config)?);
    }
    remarks.dedup();
    Ok(remarks)
}

fn files(config: &Config) -> Result<Vec<String>, ConfigError> {
    if let Some(path) = &config.geoip_database {
        Database::open(path).map_err(|error| config.refused("geoip.database", error))?;
    }
    match &config.web_config_file {
        Some(path) => crate::expose::webconfig::check(path)
            .map_err(|error| config.refused("web.config.file", error)),
        None => Ok(Vec::new()),
    }
}
