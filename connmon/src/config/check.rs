//! `--config.check`: what only shows when files are opened and names are
//! looked up.

use connmon_http::address::resolve_all;

use crate::database;

use super::{Config, ConfigError, Loaded};

/// Opens everything the configuration points at, and throws it away again.
/// What a stronger source overrides is checked as well: it is in effect the
/// day that source is gone.
///
/// # Errors
/// The first value that is wrong, else the first that is not there yet, by
/// name and by where it stands.
///
/// Returns what is accepted and should be changed.
pub fn check(loaded: &Loaded) -> Result<Vec<String>, ConfigError> {
    let mut remarks = Vec::new();
    let mut errors = Vec::new();
    for config in std::iter::once(&loaded.config).chain(&loaded.alone) {
        match web_config(config) {
            Ok(more) => remarks.extend(more),
            Err(error) => errors.push(error),
        }
        errors.extend(
            [country_database(config), listen(config)]
                .into_iter()
                .filter_map(Result::err),
        );
    }
    let wrong = errors.iter().find(|error| !error.is_not_yet());
    match wrong.or(errors.first()) {
        Some(error) => Err(error.clone()),
        None => {
            remarks.dedup();
            Ok(remarks)
        }
    }
}

fn country_database(config: &Config) -> Result<(), ConfigError> {
    let Some(path) = &config.geoip_database else {
        return Ok(());
    };
    let opened = database::open(path).map(drop);
    opened.map_err(|error| config.refused("geoip.database", error))
}

/// What serving needs: the web configuration with the files that it names,
/// and the addresses to listen on.
///
/// # Errors
/// The first that is wrong or not there yet.
pub fn check_serving(config: &Config) -> Result<(), ConfigError> {
    web_config(config)?;
    listen(config)
}

fn web_config(config: &Config) -> Result<Vec<String>, ConfigError> {
    let Some(path) = &config.web_config_file else {
        return Ok(Vec::new());
    };
    connmon_http::webconfig::check(path).map_err(|error| config.refused("web.config.file", error))
}

fn listen(config: &Config) -> Result<(), ConfigError> {
    resolve_all(&config.listen).map(drop)
}
