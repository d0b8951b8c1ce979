//! What the file says, checked as far as the file alone allows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::header::{HeaderName, HeaderValue};

use super::yaml::{self, Node, Problem, dot};

/// A value and the line it stands on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Located<T> {
    pub(super) line: usize,
    pub(super) value: T,
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
}

/// `rate_limit`: a token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    /// One token comes in this time; zero: as many as one likes.
    pub(super) interval: Duration,
    /// Tokens the bucket holds.
    pub(super) burst: u64,
}

/// PEM text in the file, or a file that has it.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// Inline.
    Text(Located<String>),
    /// A file, joined with the directory of the configuration.
    File(Located<PathBuf>),
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

/// TLS versions the file may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Version {
    /// Accepted, never spoken.
    Tls10,
    /// Accepted, never spoken.
    Tls11,
    /// RFC 5246.
    Tls12,
    /// RFC 8446.
    Tls13,
}

/// `tls_server_config`, complete: there is a certificate and a key.
#[derive(Clone)]
pub(super) struct TlsSettings {
    pub(super) line: usize,
    pub(super) certificate: Source,
    pub(super) key: Source,
    pub(super) client_auth: ClientAuth,
    pub(super) client_ca: Option<Source>,
    pub(super) allowed_sans: Option<Vec<String>>,
    pub(super) min_version: Version,
    pub(super) max_version: Version,
    pub(super) cipher_suites: Located<Vec<String>>,
    pub(super) curves: Located<Vec<String>>,
    pub(super) prefer_server_order: bool,
}

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

const VERSIONS: [(&str, Version); 4] = [
    ("TLS10", Version::Tls10),
    ("TLS11", Version::Tls11),
    ("TLS12", Version::Tls12),
    ("TLS13", Version::Tls13),
];

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
        let mut settings = Self {
            is_blank: false,
            tls: None,
            http2: true,
            headers: Vec::new(),
            users: BTreeMap::new(),
            rate: None,
        };
        let Some(root) = yaml::parse(text)? else {
            settings.is_blank = true;
            return Ok(settings);
        };
        for (key, node) in root.fields("")? {
            match key.as_str() {
                "tls_server_config" => settings.tls = tls(node, directory)?,
                "http_server_config" => settings.http(node)?,
                "basic_auth_users" => settings.users = users(node)?,
                "rate_limit" => settings.rate = rate(node)?,
                _ => {
                    return Err(unknown(
                        node,
                        "",
                        &key,
                        &[
                            "tls_server_config",
                            "http_server_config",
                            "basic_auth_users",
                            "rate_limit",
                        ],
                    ));
                }
            }
        }
        settings.check_http2()?;
        Ok(settings)
    }

    fn http(&mut self, node: &Node) -> Result<(), Problem> {
        const KEY: &str = "http_server_config";
        if node.is_null() {
            // In the toolkit a null is every field's zero value.
            self.http2 = false;
        }
        for (key, value) in node.fields(KEY)? {
            match key.as_str() {
                "http2" => self.http2 = value.boolean("http_server_config.http2")?,
                "headers" => self.headers = headers(value)?,
                _ => return Err(unknown(value, KEY, &key, &["http2", "headers"])),
            }
        }
        Ok(())
    }

    fn check_http2(&self) -> Result<(), Problem> {
        let Some(tls) = &self.tls else { return Ok(()) };
        let suites = &tls.cipher_suites;
        let named = |name: &str| suites.value.iter().any(|suite| suite == name);
        if self.http2
            && !suites.value.is_empty()
            && tls.min_version < Version::Tls13
            && !HTTP2_SUITES.iter().any(|name| named(name))
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

fn unknown(node: &Node, section: &str, key: &str, known: &[&str]) -> Problem {
    Problem::new(
        node.line,
        format_args!(
            "{section}{}{key}: unknown key; known here: {}",
            dot(section),
            known.join(", ")
        ),
    )
}

fn tls(node: &Node, directory: &Path) -> Result<Option<TlsSettings>, Problem> {
    const KEY: &str = "tls_server_config";
    let mut texts: BTreeMap<&str, Located<String>> = BTreeMap::new();
    let mut allowed_sans = None;
    let (mut min_version, mut max_version) = (Version::Tls12, Version::Tls13);
    let (mut cipher_suites, mut curves) = (Located::default(), Located::default());
    let mut prefer_server_order = true;
    const TEXTS: [&str; 7] = [
        "cert",
        "key",
        "client_ca",
        "cert_file",
        "key_file",
        "client_ca_file",
        "client_auth_type",
    ];
    for (key, value) in node.fields(KEY)? {
        let full = format!("{KEY}.{key}");
        let line = value.line;
        match key.as_str() {
            "client_allowed_sans" => {
                allowed_sans = match value.list(&full)? {
                    None => None,
                    Some(items) => {
                        let texts = items.iter().map(|item| item.string(&full));
                        Some(texts.collect::<Result<Vec<_>, _>>()?)
                    }
                };
            }
            "min_version" => min_version = version(value, &full, min_version)?,
            "max_version" => max_version = version(value, &full, max_version)?,
            "cipher_suites" => {
                let value = names(value, &full, "cipher", &CIPHER_SUITES)?;
                cipher_suites = Located { line, value };
            }
            "curve_preferences" => {
                let value = names(value, &full, "curve", &CURVES)?;
                curves = Located { line, value };
            }
            "prefer_server_cipher_suites" => prefer_server_order = value.boolean(&full)?,
            _ => {
                let Some(known) = TEXTS.into_iter().find(|known| *known == key) else {
                    let mut known = TEXTS.to_vec();
                    known.extend([
                        "client_allowed_sans",
                        "min_version",
                        "max_version",
                        "cipher_suites",
                        "curve_preferences",
                        "prefer_server_cipher_suites",
                    ]);
                    return Err(unknown(value, KEY, &key, &known));
                };
                let value = value.string(&full)?;
                if !value.is_empty() {
                    texts.insert(known, Located { line, value });
                }
            }
        }
    }
    if texts.is_empty() {
        // Nothing that switches TLS on.
        return Ok(None);
    }
    let mut source = |file: &str, text: &str| {
        let text = texts.remove(text).map(Source::Text);
        let file = texts.remove(file).map(|path| {
            Source::File(Located {
                line: path.line,
                value: directory.join(path.value),
            })
        });
        file.or(text)
    };
    let missing = |what: &str| {
        let text = format!("{KEY}: missing one of {what} or {what}_file");
        Problem::new(node.line, text)
    };
    let certificate = source("cert_file", "cert").ok_or_else(|| missing("cert"))?;
    let key = source("key_file", "key").ok_or_else(|| missing("key"))?;
    let client_ca = source("client_ca_file", "client_ca");
    let client_auth = client_auth(texts.get("client_auth_type"))?;
    if let (Some(ca), ClientAuth::None) = (&client_ca, client_auth) {
        return Err(Problem::new(
            ca.line(),
            format_args!(
                "{KEY}: client CA's have been configured without a client_auth_type that uses them"
            ),
        ));
    }
    let required = matches!(
        client_auth,
        ClientAuth::RequireAny | ClientAuth::RequireAndVerify
    );
    if allowed_sans.is_some() && !required {
        return Err(Problem::new(
            node.line,
            format_args!(
                "{KEY}.client_allowed_sans: requires client_auth_type to be RequireAnyClientCert or \
                 RequireAndVerifyClientCert; with any other a client need not show a certificate"
            ),
        ));
    }
    Ok(Some(TlsSettings {
        line: node.line,
        certificate,
        key,
        client_auth,
        client_ca,
        allowed_sans,
        min_version,
        max_version,
        cipher_suites,
        curves,
        prefer_server_order,
    }))
}

impl TlsSettings {
    /// Every file named.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        let sources = [
            Some(&self.certificate),
            Some(&self.key),
            self.client_ca.as_ref(),
        ];
        sources.into_iter().flatten().filter_map(Source::path)
    }
}

impl Source {
    pub(super) fn line(&self) -> usize {
        match self {
            Self::Text(text) => text.line,
            Self::File(path) => path.line,
        }
    }

    fn path(&self) -> Option<&Path> {
        match self {
            Self::Text(_) => None,
            Self::File(path) => Some(&path.value),
        }
    }
}

fn client_auth(typed: Option<&Located<String>>) -> Result<ClientAuth, Problem> {
    let Some(Located { line, value }) = typed else {
        return Ok(ClientAuth::None);
    };
    Ok(match value.as_str() {
        "NoClientCert" => ClientAuth::None,
        "RequestClientCert" => ClientAuth::Request,
        "RequireAnyClientCert" | "RequireClientCert" => ClientAuth::RequireAny,
        "VerifyClientCertIfGiven" => ClientAuth::VerifyIfGiven,
        "RequireAndVerifyClientCert" => ClientAuth::RequireAndVerify,
        _ => {
            return Err(Problem::new(
                *line,
                format_args!(
                    "tls_server_config.client_auth_type: invalid ClientAuth {value:?}; must be one of \
                     NoClientCert, RequestClientCert, RequireAnyClientCert, VerifyClientCertIfGiven, \
                     RequireAndVerifyClientCert"
                ),
            ));
        }
    })
}

fn version(node: &Node, key: &str, default: Version) -> Result<Version, Problem> {
    if node.is_left_out() {
        return Ok(default);
    }
    let text = node.string(key)?;
    let found = VERSIONS.iter().find(|(name, _)| *name == text);
    found.map(|(_, version)| *version).ok_or_else(|| {
        Problem::new(
            node.line,
            format_args!(
                "{key}: unknown TLS version {text:?}; must be one of TLS10, TLS11, TLS12, TLS13"
            ),
        )
    })
}

fn names(node: &Node, key: &str, what: &str, known: &[&str]) -> Result<Vec<String>, Problem> {
    let mut names = Vec::new();
    // Go's zero value for a null names nothing either.
    let items = node.list(key)?.unwrap_or_default();
    for item in items.iter().filter(|item| !item.is_left_out()) {
        let name = item.string(key)?;
        if !known.contains(&name.as_str()) {
            return Err(Problem::new(
                item.line,
                format_args!(
                    "{key}: unknown {what} {name:?}; must be one of {}",
                    known.join(", ")
                ),
            ));
        }
        names.push(name);
    }
    Ok(names)
}

fn headers(node: &Node) -> Result<Vec<(HeaderName, HeaderValue)>, Problem> {
    const KEY: &str = "http_server_config.headers";
    let mut headers = Vec::new();
    for (name, value) in node.pairs(KEY)? {
        let Some((known, allowed)) = HEADERS.iter().find(|(known, _)| *known == name) else {
            let known: Vec<_> = HEADERS.iter().map(|(name, _)| *name).collect();
            return Err(Problem::new(
                value.line,
                format_args!(
                    "{KEY}: HTTP header {name:?} can not be configured; only {}",
                    known.join(", ")
                ),
            ));
        };
        let text = value.string(&format!("{KEY}.{name}"))?;
        if !allowed.is_empty() && !allowed.contains(&text.as_str()) {
            return Err(Problem::new(
                value.line,
                format_args!(
                    "{KEY}: invalid value for {name}: expected one of {}, but got {text:?}",
                    allowed.join(", ")
                ),
            ));
        }
        // As Go's server does when it writes the header.
        let text = text.replace(['\r', '\n'], " ");
        let bytes = HeaderValue::from_bytes(text.trim().as_bytes()).map_err(|_| {
            Problem::new(
                value.line,
                format_args!("{KEY}: invalid value for {name}: {text:?} has control characters"),
            )
        })?;
        let name = HeaderName::from_bytes(known.as_bytes())
            .map_err(|error| Problem::new(value.line, format_args!("{KEY}: {name}: {error}")))?;
        headers.push((name, bytes));
    }
    Ok(headers)
}

fn users(node: &Node) -> Result<BTreeMap<String, String>, Problem> {
    const KEY: &str = "basic_auth_users";
    let mut users = BTreeMap::new();
    for (name, value) in node.pairs(KEY)? {
        let full = format!("{KEY}.{name}");
        let hash = value.string(&full)?;
        // The value itself is a secret, or someone's password by mistake.
        check_hash(&hash).map_err(|why| {
            Problem::new(
                value.line,
                format_args!(
                    "{full}: {why}; must be a bcrypt hash like $2y$10$…, see htpasswd -nBC 10"
                ),
            )
        })?;
        users.insert(name, hash);
    }
    Ok(users)
}

/// What Go's `bcrypt.Cost` asks of a hash.
fn check_hash(hash: &str) -> Result<(), String> {
    let bytes = hash.as_bytes();
    if bytes.len() < 59 {
        return Err("the hash is too short to be a bcrypted password".to_owned());
    }
    if bytes[0] != b'$' {
        return Err("a bcrypt hash starts with $".to_owned());
    }
    if bytes[1] > b'2' {
        return Err("this version of bcrypt is too new (2 is the last)".to_owned());
    }
    let cost_at = if bytes[2] == b'$' { 3 } else { 4 };
    let cost = std::str::from_utf8(&bytes[cost_at..cost_at + 2]).ok();
    match cost.and_then(|cost| cost.parse::<u32>().ok()) {
        Some(4..=31) => Ok(()),
        Some(cost) => Err(format!("cost {cost} is outside 4 to 31")),
        None => Err("it has no cost".to_owned()),
    }
}

fn rate(node: &Node) -> Result<Option<Rate>, Problem> {
    const KEY: &str = "rate_limit";
    let (mut interval, mut burst) = (0, 0);
    for (key, value) in node.fields(KEY)? {
        match key.as_str() {
            "interval" => interval = value.duration_ns("rate_limit.interval")?,
            "burst" => burst = value.integer("rate_limit.burst")?,
            _ => return Err(unknown(value, KEY, &key, &["interval", "burst"])),
        }
    }
    Ok((interval != 0).then(|| Rate {
        // Go's rate.Every takes a negative interval for no limit.
        interval: Duration::from_nanos(u64::try_from(interval).unwrap_or(0)),
        burst: u64::try_from(burst).unwrap_or(0),
    }))
}
