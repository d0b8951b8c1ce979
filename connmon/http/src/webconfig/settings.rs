//! What the file says, checked as far as the file alone allows.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::header::{HeaderName, HeaderValue};
use serde::Deserialize;

use super::users::check_hash;
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
struct TlsSection {
    cert: Option<Located<String>>,
    key: Option<Located<String>>,
    client_ca: Option<Located<String>>,
    cert_file: Option<Located<String>>,
    key_file: Option<Located<String>>,
    client_ca_file: Option<Located<String>>,
    client_auth_type: Option<Located<String>>,
    client_allowed_sans: Option<Vec<String>>,
    min_version: Option<Located<String>>,
    max_version: Option<Located<String>>,
    cipher_suites: Option<Located<Vec<Located<String>>>>,
    curve_preferences: Option<Vec<Located<String>>>,
    prefer_server_cipher_suites: Option<bool>,
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
    pub(super) tls: Option<TlsSettings>,
    /// `http_server_config.http2`; only with TLS.
    pub(super) http2: bool,
    /// `http_server_config.headers`; a blank value removes the header.
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    /// User name → bcrypt hash.
    pub(super) users: BTreeMap<String, String>,
    /// `rate_limit`.
    pub(super) rate: Option<Rate>,
    /// What is accepted and should be changed.
    pub(super) remarks: Vec<String>,
}

/// `rate_limit`: a token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    /// One token comes in this time.
    pub(super) interval: Duration,
    /// Tokens the bucket holds.
    pub(super) burst: u64,
}

/// PEM, and the key that has it or names its file.
#[derive(Clone)]
pub(super) struct Pem {
    pub(super) key: &'static str,
    pub(super) line: usize,
    pub(super) source: Source,
}

/// PEM text in the file, or a file that has it.
#[derive(Clone)]
pub(super) enum Source {
    /// Inline.
    Text(String),
    /// A file, joined with the directory of the configuration.
    File(PathBuf),
}

/// `client_auth_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientAuth {
    /// `NoClientCert`.
    None,
    /// `RequestClientCert`.
    Request,
    /// `RequireAnyClientCert`, and its old name `RequireClientCert`.
    RequireAny,
    /// `VerifyClientCertIfGiven`.
    VerifyIfGiven,
    /// `RequireAndVerifyClientCert`.
    RequireAndVerify,
}

/// TLS versions the file may name; the first two are never spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Version {
    Tls10,
    Tls11,
    Tls12,
    Tls13,
}

/// `tls_server_config`, complete: there is a certificate and a key.
#[derive(Clone)]
pub(super) struct TlsSettings {
    pub(super) line: usize,
    pub(super) certificate: Pem,
    pub(super) key: Pem,
    pub(super) client_auth: ClientAuth,
    pub(super) client_ca: Option<Pem>,
    pub(super) allowed_sans: Option<Vec<String>>,
    pub(super) min_version: Version,
    pub(super) max_version: Version,
    pub(super) cipher_suites: Located<Vec<&'static str>>,
    pub(super) curves: Vec<&'static str>,
    pub(super) prefer_server_order: bool,
}

const CLIENT_AUTH_TYPES: [(&str, ClientAuth); 6] = [
    ("NoClientCert", ClientAuth::None),
    ("RequestClientCert", ClientAuth::Request),
    ("RequireAnyClientCert", ClientAuth::RequireAny),
    ("RequireClientCert", ClientAuth::RequireAny),
    ("VerifyClientCertIfGiven", ClientAuth::VerifyIfGiven),
    ("RequireAndVerifyClientCert", ClientAuth::RequireAndVerify),
];

const VERSIONS: [(&str, Version); 4] = [
    ("TLS10", Version::Tls10),
    ("TLS11", Version::Tls11),
    ("TLS12", Version::Tls12),
    ("TLS13", Version::Tls13),
];

/// The names that Go's `tls.CipherSuites` gives or has given.
pub(super) const CIPHER_SUITES: [&str; 17] = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384",
];

/// One of these has to be offered with HTTP/2 over TLS 1.2 (RFC 7540, 9.2.2,
/// which asks for the RSA one; Go's `http2.ConfigureServer` takes either).
const HTTP2_SUITES: [&str; 2] = [
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
];

pub(super) const CURVES: [&str; 4] = ["CurveP256", "CurveP384", "CurveP521", "X25519"];

/// Headers that may be set, with their values where only some are allowed.
const HEADERS: [(&str, &[&str]); 5] = [
    ("Content-Security-Policy", &[]),
    ("Strict-Transport-Security", &[]),
    ("X-Content-Type-Options", &["nosniff"]),
    ("X-Frame-Options", &["deny", "sameorigin"]),
    ("X-XSS-Protection", &[]),
];

impl Settings {
    /// Reads `text`, whose relative paths are meant from `directory`.
    pub(super) fn parse(text: &str, directory: &Path) -> Result<Self, Problem> {
        let document = yaml::parse::<Document>(text, Booleans::Yaml11)?;
        let is_blank = document.is_none();
        let document = document.unwrap_or_default();
        let http = document.http_server_config.unwrap_or_default();
        let mut remarks = Vec::new();
        let settings = Self {
            is_blank,
            tls: match document.tls_server_config {
                Some(section) => tls(section, directory)?,
                None => None,
            },
            http2: http.http2.unwrap_or(true),
            headers: headers(http.headers.unwrap_or_default())?,
            users: users(document.basic_auth_users.unwrap_or_default(), &mut remarks)?,
            rate: rate(document.rate_limit.unwrap_or_default())?,
            remarks,
        };
        settings.check_http2()?;
        Ok(settings)
    }

    fn check_http2(&self) -> Result<(), Problem> {
        let Some(tls) = &self.tls else { return Ok(()) };
        let suites = &tls.cipher_suites;
        if self.http2
            && !suites.value.is_empty()
            && tls.min_version < Version::Tls13
            && !HTTP2_SUITES.iter().any(|name| suites.value.contains(name))
        {
            return Err(Problem::new(
                suites.line,
                format_args!(
                    "tls_server_config.cipher_suites: missing an HTTP/2-required AES_128_GCM_SHA256 \
                     suite: add {} or {}, or set http_server_config.http2 to false",
                    HTTP2_SUITES[0], HTTP2_SUITES[1]
                ),
            ));
        }
        Ok(())
    }
}

fn tls(section: Located<TlsSection>, directory: &Path) -> Result<Option<TlsSettings>, Problem> {
    let Located {
        line,
        value: section,
    } = section;
    let refuse =
        |line, what: &dyn Display| Err(Problem::new(line, format_args!("tls_server_config{what}")));
    let given = |text: Option<Located<String>>| text.filter(|text| !text.value.is_empty());
    // The file beats the text.
    let pem = |key, text, file_key, file| {
        let file = given(file).map(|file: Located<String>| Pem {
            key: file_key,
            line: file.line,
            source: Source::File(directory.join(file.value)),
        });
        file.or(given(text).map(|text| Pem {
            key,
            line: text.line,
            source: Source::Text(text.value),
        }))
    };
    let certificate = pem("cert", section.cert, "cert_file", section.cert_file);
    let key = pem("key", section.key, "key_file", section.key_file);
    let client_ca = pem(
        "client_ca",
        section.client_ca,
        "client_ca_file",
        section.client_ca_file,
    );
    let auth_type = given(section.client_auth_type);
    if certificate.is_none() && key.is_none() && client_ca.is_none() && auth_type.is_none() {
        // Nothing that switches TLS on.
        return Ok(None);
    }
    let Some(certificate) = certificate else {
        return refuse(line, &": missing one of cert or cert_file");
    };
    let Some(key) = key else {
        return refuse(line, &": missing one of key or key_file");
    };
    let client_auth = match auth_type {
        Some(name) => find("client_auth_type", &name, CLIENT_AUTH_TYPES)?,
        None => ClientAuth::None,
    };
    if let (Some(ca), ClientAuth::None) = (&client_ca, client_auth) {
        return refuse(
            ca.line,
            &format_args!(
                ".{}: client CA's have been configured without a client_auth_type that uses them",
                ca.key
            ),
        );
    }
    let required = matches!(
        client_auth,
        ClientAuth::RequireAny | ClientAuth::RequireAndVerify
    );
    if section.client_allowed_sans.is_some() && !required {
        return refuse(
            line,
            &".client_allowed_sans: requires client_auth_type to be RequireAnyClientCert or \
              RequireAndVerifyClientCert; with any other a client need not show a certificate",
        );
    }
    let version = |key, name: Option<Located<String>>, default| match name {
        Some(name) => find(key, &name, VERSIONS),
        None => Ok(default),
    };
    let suites = section.cipher_suites.unwrap_or(Located {
        line,
        value: Vec::new(),
    });
    Ok(Some(TlsSettings {
        line,
        certificate,
        key,
        client_auth,
        client_ca,
        allowed_sans: section.client_allowed_sans,
        min_version: version("min_version", section.min_version, Version::Tls12)?,
        max_version: version("max_version", section.max_version, Version::Tls13)?,
        cipher_suites: Located {
            line: suites.line,
            value: names("cipher_suites", &suites.value, &CIPHER_SUITES)?,
        },
        curves: names(
            "curve_preferences",
            &section.curve_preferences.unwrap_or_default(),
            &CURVES,
        )?,
        prefer_server_order: section.prefer_server_cipher_suites.unwrap_or(true),
    }))
}

/// What `name`, a value of `key` in `tls_server_config`, stands for.
fn find<T>(
    key: &str,
    name: &Located<String>,
    known: impl IntoIterator<Item = (&'static str, T)> + Clone,
) -> Result<T, Problem> {
    let mut all = known.clone().into_iter();
    match all.find(|(known, _)| *known == name.value) {
        Some((_, value)) => Ok(value),
        None => {
            let known: Vec<_> = known.into_iter().map(|(name, _)| name).collect();
            let text = format_args!(
                "tls_server_config.{key}: unknown value {:?}; must be one of {}",
                name.value,
                known.join(", ")
            );
            Err(Problem::new(name.line, text))
        }
    }
}

fn names(
    key: &str,
    names: &[Located<String>],
    known: &[&'static str],
) -> Result<Vec<&'static str>, Problem> {
    let known = known.iter().map(|name| (*name, *name));
    let found = names.iter().map(|name| find(key, name, known.clone()));
    found.collect()
}

impl TlsSettings {
    /// Every file named.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        let pems = [
            Some(&self.certificate),
            Some(&self.key),
            self.client_ca.as_ref(),
        ];
        pems.into_iter()
            .flatten()
            .filter_map(|pem| match &pem.source {
                Source::Text(_) => None,
                Source::File(path) => Some(path.as_path()),
            })
    }
}

fn headers(
    pairs: BTreeMap<String, Located<Option<String>>>,
) -> Result<Vec<(HeaderName, HeaderValue)>, Problem> {
    const KEY: &str = "http_server_config.headers";
    let mut headers = Vec::new();
    for (name, value) in pairs {
        let refuse =
            |what: &dyn Display| Problem::new(value.line, format_args!("{KEY}.{name}: {what}"));
        let Some((known, allowed)) = HEADERS.iter().find(|(known, _)| *known == name) else {
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
        let bytes = HeaderValue::from_bytes(line.trim().as_bytes())
            .map_err(|_| refuse(&format_args!("{text:?} has control characters")))?;
        let known = HeaderName::from_bytes(known.as_bytes()).map_err(|error| refuse(&error))?;
        headers.push((known, bytes));
    }
    Ok(headers)
}

fn users(
    pairs: BTreeMap<String, Located<Option<String>>>,
    remarks: &mut Vec<String>,
) -> Result<BTreeMap<String, String>, Problem> {
    let mut users = BTreeMap::new();
    for (name, Located { line, value }) in pairs {
        let key = format!("basic_auth_users.{name}");
        let hash = value.unwrap_or_default();
        // The value itself is a secret, or someone's password by mistake.
        let slow = check_hash(&hash).map_err(|why| {
            Problem::new(
                line,
                format_args!(
                    "{key}: {why}; must be a bcrypt hash like $2y$10$…, see htpasswd -nBC 10"
                ),
            )
        })?;
        remarks.extend(slow.map(|why| format!("line {line}: {key}: {why}")));
        users.insert(name, hash);
    }
    Ok(users)
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
