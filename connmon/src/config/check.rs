//! `--config.check`: what only shows when files are opened and names are
//! looked up.

use connmon_http::address::resolve_all;

use super::{Config, ConfigError, Loaded};
use crate::database;

/// Opens every file and looks up every name in the configuration. Values that
/// a stronger source overrides are checked as well: they apply once that
/// source is gone. Returns what is accepted and should be changed.
///
/// # Errors
/// The first value that is wrong, else the first that is not there yet, by
/// name and by where it stands.
pub fn check(loaded: &Loaded) -> Result<Vec<String>, ConfigError> {
    let mut remarks = Vec::new();
    let mut errors = Vec::new();
    for config in std::iter::once(&loaded.config).chain(&loaded.alone) {
        match web_config(config) {
            Ok(more) => remarks.extend(more),
            Err(error) => errors.push(error),
        }
        if let Some(path) = &config.geoip_database
            && let Err(error) = database::open(path)
        {
            errors.push(config.refused("geoip.database", error));
        }
        errors.extend(resolve_all(&config.listen).err());
    }
    // `false` comes first.
    errors.sort_by_key(ConfigError::is_not_yet);
    match errors.into_iter().next() {
        Some(error) => Err(error),
        None => {
            remarks.dedup();
            Ok(remarks)
        }
    }
}

/// Checks what serving needs: the web configuration with the files that it
/// names, and the addresses to listen on.
///
/// # Errors
/// The first that is wrong or not there yet.
pub fn check_serving(config: &Config) -> Result<(), ConfigError> {
    web_config(config)?;
    resolve_all(&config.listen).map(drop)
}

fn web_config(config: &Config) -> Result<Vec<String>, ConfigError> {
    let Some(path) = &config.web_config_file else {
        return Ok(Vec::new());
    };
    connmon_http::webconfig::check(path).map_err(|error| config.refused("web.config.file", error))
}
