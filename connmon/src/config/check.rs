//! `--config.check`: what only shows when files are opened.

use super::{Config, ConfigError, Loaded};
use crate::database;

/// Opens everything the configuration points at, and throws it away again.
/// What a stronger source overrides is checked as well: it is in effect the
/// day that source is gone.
///
/// # Errors
/// The first file that cannot be used, by name and by where that stands.
pub fn check(loaded: &Loaded) -> Result<(), ConfigError> {
    let mut configs = std::iter::once(&loaded.config).chain(&loaded.alone);
    configs.try_for_each(files)
}

fn files(config: &Config) -> Result<(), ConfigError> {
    if let Some(path) = &config.geoip_database {
        database::open(path).map_err(|error| config.refused("geoip.database", error))?;
    }
    if let Some(path) = &config.web_config_file {
        crate::expose::webconfig::check(path)
            .map_err(|error| config.refused("web.config.file", error))?;
    }
    Ok(())
}
