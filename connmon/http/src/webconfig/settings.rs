//! The text of the web configuration → [`Settings`], checked as far as the
//! text alone allows.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper::header::{HeaderName, HeaderValue};
use rustls::ServerConfig;
use serde::Deserialize;

use super::rate::Rate;
use super::tls::{TlsSection, TlsSettings};
use super::users::cost_of;
use crate::duration;
use crate::yaml::{self, Booleans, Located, Problem};

/// The file as written. A key without a value is a key left out.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Document {
    tls_server_config: Option<Located<TlsSection>>,
    http_server_config: Option<HttpSection>,
    basic_auth_users: Option<BTreeMap<String, Located<Option<String>>>>,
    rate_limit: Option<RateSection>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct HttpSection {
    http2: Option<bool>,
    headers: Option<BTreeMap<String, Located<Option<String>>>>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RateSection {
    interval: Option<Located<String>>,
    burst: Option<u64>,
}

/// The whole file. `basic_auth_users` and key material are secrets: there is
/// no `Debug`.
#[derive(Clone)]
pub struct Settings {
    /// There is no document, not even an empty one.
    pub(super) is_blank: bool,
    /// `None` serves plain HTTP.
    tls: Option<TlsSettings>,
    /// Of certificates and keys, once they are loaded.
    pub(super) tls_config: Option<Arc<ServerConfig>>,
    /// `http_server_config.headers`; an empty value removes the header.
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    /// User name → bcrypt hash.
    pub(super) users: BTreeMap<String, String>,
    pub(super) rate: Option<Rate>,
    /// What is accepted and should be changed.
    pub(super) remarks: Vec<String>,
}

/// Headers that may be set, with their values where only some are allowed.
const HEADERS: [(&str, &[&str]); 5] = [
    ("Content-Security-Policy", &[]),
    ("Strict-Transport-Security", &[]),
    ("X-Content-Type-Options", &["nosniff"]),
    ("X-Frame-Options", &["deny", "sameorigin"]),
    ("X-XSS-Protection", &[]),
];

/// The cost from which one bcrypt check takes about a second or more.
const SLOW_COST: u32 = 14;

impl Settings {
    /// Relative paths in `text` start from `directory`.
    pub(super) fn parse(text: &str, directory: &Path) -> Result<Self, Problem> {
        let document = yaml::parse::<Document>(text, Booleans::Yaml11)?;
        let is_blank = document.is_none();
        let document = document.unwrap_or_default();
        let http = document.http_server_config.unwrap_or_default();
        let http2 = http.http2.unwrap_or(true);
        let mut remarks = Vec::new();
        let tls = match document.tls_server_config {
            Some(section) => TlsSettings::new(section, directory, http2, &mut remarks)?,
            None => None,
        };
        let headers = http.headers.unwrap_or_default().into_iter();
        let users = document.basic_auth_users.unwrap_or_default().into_iter();
        Ok(Self {
            is_blank,
            tls,
            tls_config: None,
            headers: headers.map(header).collect::<Result<_, _>>()?,
            users: users
                .map(|(name, hash)| user(name, hash, &mut remarks))
                .collect::<Result<_, _>>()?,
            rate: rate(document.rate_limit.unwrap_or_default())?,
            remarks,
        })
    }

    /// The files that the settings name.
    pub(super) fn files(&self) -> impl Iterator<Item = PathBuf> {
        self.tls.iter().flat_map(TlsSettings::files)
    }

    /// Reads these files. If one is wrong, what was loaded before stays.
    pub(super) fn load(&mut self, remarks: &mut Vec<String>) -> Result<(), Problem> {
        let loaded = self.tls.as_ref().map(|tls| tls.load(remarks));
        self.tls_config = loaded.transpose()?;
        Ok(())
    }
}

fn header(
    (name, value): (String, Located<Option<String>>),
) -> Result<(HeaderName, HeaderValue), Problem> {
    let refuse = |what: &dyn Display| {
        let key = "http_server_config.headers";
        Problem::new(value.line, format_args!("{key}.{name}: {what}"))
    };
    let Some((_, allowed)) = HEADERS.iter().find(|(known, _)| *known == name) else {
        let known = HEADERS.map(|(name, _)| name).join(", ");
        return Err(refuse(&format_args!(
            "the header can not be configured; only {known}"
        )));
    };
    let text = value.value.as_deref().unwrap_or_default();
    if !allowed.is_empty() && !allowed.contains(&text) {
        let allowed = allowed.join(", ");
        return Err(refuse(&format_args!(
            "must be one of {allowed}, not {text:?}"
        )));
    }
    // As in Go's server, a header is one line.
    let line = text.replace(['\r', '\n'], " ");
    let value = HeaderValue::from_bytes(line.trim().as_bytes())
        .map_err(|_| refuse(&format_args!("{text:?} has control characters")))?;
    let name = HeaderName::try_from(name.as_str()).map_err(|error| refuse(&error))?;
    Ok((name, value))
}

/// Name and hash. The hash is in no message: it is a secret, or by mistake a
/// password.
fn user(
    name: String,
    hash: Located<Option<String>>,
    remarks: &mut Vec<String>,
) -> Result<(String, String), Problem> {
    let (line, hash) = (hash.line, hash.value.unwrap_or_default());
    let key = format!("basic_auth_users.{name}");
    let cost = cost_of(&hash).map_err(|why| {
        let remedy = "must be a bcrypt hash like $2y$10$…, see htpasswd -nBC 10";
        Problem::new(line, format_args!("{key}: {why}; {remedy}"))
    })?;
    if cost >= SLOW_COST {
        remarks.push(format!(
            "line {line}: {key}: a check of cost {cost} takes a second or more, during which no \
             other password can be checked; use a cost of 10 to 12"
        ));
    }
    Ok((name, hash))
}

fn rate(section: RateSection) -> Result<Option<Rate>, Problem> {
    let Some(interval) = section.interval else {
        return Ok(None);
    };
    let every = duration(&interval.value)
        .map_err(|why| Problem::new(interval.line, format_args!("rate_limit.interval: {why}")))?;
    Ok((!every.is_zero()).then(|| Rate {
        interval: every,
        burst: section.burst.unwrap_or(0),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_of_a_second_is_named() {
        let remarks = |cost| {
            let rest = "abcdefghijklmnopqrstuu5Lo0g67CiD3M4RpN1BmBD4Crp5w7dbK";
            let text = format!("basic_auth_users: {{amy: $2b${cost}${rest}}}");
            Settings::parse(&text, Path::new("")).unwrap().remarks
        };
        assert!(remarks(12).is_empty());
        assert!(remarks(14)[0].contains("cost 14"));
        assert!(remarks(31)[0].contains("cost 31"));
    }
}
