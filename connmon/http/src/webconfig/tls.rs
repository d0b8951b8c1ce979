//! `tls_server_config`: what may be written there, and the rustls
//! configuration that it stands for (ring provider). [`TlsSettings::new`]
//! checks the text alone, [`TlsSettings::load`] reads certificates and keys.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring::{self, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ServerConfig, SupportedCipherSuite, SupportedProtocolVersion, version};
use serde::Deserialize;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::clients::{ClientAuth, ClientPolicy};
use crate::is_state_of_host;
use crate::read_file::read_file;
use crate::yaml::{Located, Problem};

/// Largest certificate or key file, bytes.
const MAX_PEM_BYTES: u64 = 1 << 20;

/// The section as written. A key without a value is a key left out.
#[derive(Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct TlsSection {
    cert: Option<Located<String>>,
    key: Option<Located<String>>,
    client_ca: Option<Located<String>>,
    cert_file: Option<Located<String>>,
    key_file: Option<Located<String>>,
    client_ca_file: Option<Located<String>>,
    client_auth_type: Option<ClientAuth>,
    client_allowed_sans: Option<Vec<String>>,
    min_version: Option<Version>,
    max_version: Option<Version>,
    cipher_suites: Option<Located<Vec<Suite>>>,
    curve_preferences: Option<Vec<Curve>>,
    prefer_server_cipher_suites: Option<bool>,
}

/// TLS versions the file may name; rustls speaks the last two.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Deserialize)]
enum Version {
    TLS10,
    TLS11,
    TLS12,
    TLS13,
}

/// The names in Go's `tls.CipherSuites`, past and present.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[expect(non_camel_case_types, reason = "the names that Go gives them")]
enum Suite {
    TLS_AES_128_GCM_SHA256,
    TLS_AES_256_GCM_SHA384,
    TLS_CHACHA20_POLY1305_SHA256,
    TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA,
    TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA,
    TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA,
    TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA,
    TLS_RSA_WITH_AES_128_CBC_SHA,
    TLS_RSA_WITH_AES_256_CBC_SHA,
    TLS_RSA_WITH_AES_128_GCM_SHA256,
    TLS_RSA_WITH_AES_256_GCM_SHA384,
}

/// HTTP/2 over TLS 1.2 needs one of these (RFC 7540, 9.2.2 asks for the RSA
/// one; Go's `http2.ConfigureServer` takes either).
const HTTP2_SUITES: [Suite; 2] = [
    Suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    Suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
];

/// The names of Go's `tls.CurveID`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
enum Curve {
    CurveP256,
    CurveP384,
    CurveP521,
    X25519,
}

impl Suite {
    fn available(self) -> Option<SupportedCipherSuite> {
        let name = format!("{self:?}");
        let mut all = ring::ALL_CIPHER_SUITES.iter();
        // rustls marks the suites of TLS 1.3 in their names.
        all.find(|suite| format!("{:?}", suite.suite()).replacen("TLS13_", "TLS_", 1) == name)
            .copied()
    }
}

impl Curve {
    fn available(&self) -> Option<&'static dyn SupportedKxGroup> {
        match self {
            Self::CurveP256 => Some(kx_group::SECP256R1),
            Self::CurveP384 => Some(kx_group::SECP384R1),
            Self::CurveP521 => None,
            Self::X25519 => Some(kx_group::X25519),
        }
    }
}

/// A complete `tls_server_config`: there is a certificate and a key.
#[derive(Clone)]
pub(super) struct TlsSettings {
    line: usize,
    section: TlsSection,
    /// Relative paths start here.
    directory: PathBuf,
    http2: bool,
}

/// Suites and curves, and versions.
type Chosen = (Arc<CryptoProvider>, Vec<&'static SupportedProtocolVersion>);

impl TlsSettings {
    /// Checks the section; `None` if nothing in it switches TLS on. `remarks`
    /// gets what the file asks for and does not get.
    pub(super) fn new(
        section: Located<TlsSection>,
        directory: &Path,
        http2: bool,
        remarks: &mut Vec<String>,
    ) -> Result<Option<Self>, Problem> {
        let this = Self {
            line: section.line,
            section: section.value,
            directory: directory.to_owned(),
            http2,
        };
        let section = &this.section;
        let keys = ["cert", "key", "client_ca"];
        if section.client_auth_type.is_none() && keys.iter().all(|key| this.pem(key).is_none()) {
            return Ok(None);
        }
        this.required("cert")?;
        this.required("key")?;
        if let (Some(ca), ClientAuth::NoClientCert) = (this.pem("client_ca"), this.client_auth()) {
            let why = "client CA's have been configured without a client_auth_type that uses them";
            return Err(ca.refuse(why));
        }
        if section.client_allowed_sans.is_some() && !this.client_auth().is_mandatory() {
            let what = ".client_allowed_sans: requires client_auth_type to be RequireAnyClientCert \
                        or RequireAndVerifyClientCert; with any other a client need not show a \
                        certificate";
            return Err(refuse(this.line, what));
        }
        this.choose(remarks)?;
        Ok(Some(this))
    }

    fn client_auth(&self) -> ClientAuth {
        let auth = self.section.client_auth_type;
        auth.unwrap_or(ClientAuth::NoClientCert)
    }

    /// What `key`, or `key` with `_file`, gives. Where both are given the file
    /// counts. An empty value is not given.
    fn pem(&self, key: &'static str) -> Option<Pem> {
        let section = &self.section;
        let (text, file) = match key {
            "cert" => (&section.cert, &section.cert_file),
            "key" => (&section.key, &section.key_file),
            _ => (&section.client_ca, &section.client_ca_file),
        };
        let given = |value: &&Located<String>| !value.value.is_empty();
        let file = file.as_ref().filter(given);
        let pem = file.or(text.as_ref().filter(given))?;
        Some(Pem {
            key,
            line: pem.line,
            text: pem.value.clone(),
            path: file.map(|file| self.directory.join(&file.value)),
        })
    }

    fn required(&self, key: &'static str) -> Result<Pem, Problem> {
        let missing = || {
            refuse(
                self.line,
                format_args!(": missing one of {key} or {key}_file"),
            )
        };
        self.pem(key).ok_or_else(missing)
    }

    /// What the section leaves of suites, curves and versions.
    fn choose(&self, remarks: &mut Vec<String>) -> Result<Chosen, Problem> {
        let section = &self.section;
        let min_version = section.min_version.unwrap_or(Version::TLS12);
        let max_version = section.max_version.unwrap_or(Version::TLS13);
        let speaks = |version| min_version <= version && max_version >= version;
        let (mut tls12, tls13) = (speaks(Version::TLS12), speaks(Version::TLS13));
        if !tls12 && !tls13 {
            let what = ": no version is left between min_version and max_version; connmon speaks \
                        TLS12 and TLS13";
            return Err(refuse(self.line, what));
        }
        if min_version < Version::TLS12 {
            remarks.push("min_version is below TLS12: TLS 1.2 is the oldest spoken".to_owned());
        }
        let mut provider = ring::default_provider();
        if let Some(Located {
            line,
            value: listed,
        }) = &section.cipher_suites
            && !listed.is_empty()
        {
            let required = HTTP2_SUITES.iter().any(|suite| listed.contains(suite));
            if self.http2 && min_version < Version::TLS13 && !required {
                let suites = list(&HTTP2_SUITES);
                let what = format_args!(
                    ".cipher_suites: missing an HTTP/2-required AES_128_GCM_SHA256 suite: add one \
                     of {suites}, or set http_server_config.http2 to false"
                );
                return Err(refuse(*line, what));
            }
            let (known, absent): (Vec<Suite>, Vec<Suite>) =
                listed.iter().partition(|suite| suite.available().is_some());
            if !absent.is_empty() {
                let names = list(&absent);
                remarks.push(format!("cipher suites not available and left out: {names}"));
            }
            // As in Go, the list is about TLS 1.2; TLS 1.3 keeps all its own.
            let mut suites: Vec<_> = known.into_iter().filter_map(Suite::available).collect();
            suites.retain(|suite| suite.tls13().is_none());
            if tls12 && suites.is_empty() {
                if !tls13 {
                    let names = list(listed);
                    let what = format_args!(
                        ".cipher_suites: none of {names} is available; the ECDHE suites with GCM \
                         or CHACHA20_POLY1305 are"
                    );
                    return Err(refuse(*line, what));
                }
                tls12 = false;
                let remark = "no cipher suite is left for TLS 1.2: only TLS 1.3 is spoken";
                remarks.push(remark.to_owned());
            }
            provider
                .cipher_suites
                .retain(|suite| suite.tls13().is_some());
            provider.cipher_suites.extend(suites);
        }
        let curves = section.curve_preferences.as_deref().unwrap_or_default();
        let available: Vec<_> = curves.iter().filter_map(Curve::available).collect();
        if curves.contains(&Curve::CurveP521) {
            let remark = "CurveP521 is not available and left out of curve_preferences; alone it \
                          leaves the default curves";
            remarks.push(remark.to_owned());
        }
        if !available.is_empty() {
            provider.kx_groups = available;
        }
        let versions = [(tls13, &version::TLS13), (tls12, &version::TLS12)];
        let versions = versions.into_iter().filter(|it| it.0).map(|it| it.1);
        Ok((Arc::new(provider), versions.collect()))
    }

    /// Every file named.
    pub(super) fn files(&self) -> impl Iterator<Item = PathBuf> {
        let keys = ["cert", "key", "client_ca"].into_iter();
        keys.filter_map(|key| self.pem(key)?.path)
    }

    /// Reads certificate, key and client CAs.
    pub(super) fn load(&self, remarks: &mut Vec<String>) -> Result<Arc<ServerConfig>, Problem> {
        let (provider, versions) = self.choose(&mut Vec::new())?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)
            .map_err(|error| refuse(self.line, format_args!(": {error}")))?;
        let builder = if self.client_auth() == ClientAuth::NoClientCert {
            builder.with_no_client_auth()
        } else {
            let policy = self.client_policy(&provider, remarks)?;
            builder.with_client_cert_verifier(Arc::new(policy))
        };
        let resolver = SingleCertAndKey::from(self.certified_key(&provider)?);
        let mut config = builder.with_cert_resolver(Arc::new(resolver));
        let server_order = self.section.prefer_server_cipher_suites;
        config.ignore_client_order = server_order.unwrap_or(true);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        if self.http2 {
            config.alpn_protocols.insert(0, b"h2".to_vec());
        }
        Ok(Arc::new(config))
    }

    fn certified_key(&self, provider: &CryptoProvider) -> Result<CertifiedKey, Problem> {
        let pem = self.required("cert")?;
        let refuse = |why: &dyn Display| pem.refuse(why);
        let pem = pem.read()?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&pem)
            .collect::<Result<_, _>>()
            .map_err(|error| refuse(&format_args!("bad PEM: {error:?}")))?;
        let first = chain.first();
        let first = first.ok_or_else(|| refuse(&"no PEM certificate in it"))?;
        // rustls would refuse an unknown critical extension.
        let (_, certificate) = X509Certificate::from_der(first)
            .map_err(|error| refuse(&format_args!("bad certificate: {error}")))?;
        let public = certificate.public_key().raw;

        let pem = self.required("key")?;
        let refuse = |why: &dyn Display| pem.refuse(why);
        let pem = pem.read()?;
        let labelled = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| match error {
            PemError::NoItemsFound => {
                refuse(&"no PEM private key in it (an encrypted one cannot be used)")
            }
            error => refuse(&format_args!("bad PEM: {error:?}")),
        })?;
        // The label may be wrong; the content decides.
        let key = PrivateKeyDer::try_from(labelled.secret_der())
            .map_err(|_| refuse(&"the private key is neither PKCS#1, PKCS#8 nor SEC1"))?;
        let loaded = provider.key_provider.load_private_key(key.clone_key());
        let key = loaded.map_err(|_| {
            refuse(
                &"the private key cannot be used: connmon takes RSA keys of 2048 to 8192 bits, \
                  ECDSA keys of the curves P-256 and P-384, and Ed25519 keys",
            )
        })?;
        if key.public_key().is_some_and(|key| *key != *public) {
            return Err(refuse(&"the private key does not match the certificate"));
        }
        Ok(CertifiedKey::new(chain, key))
    }

    fn client_policy(
        &self,
        provider: &Arc<CryptoProvider>,
        remarks: &mut Vec<String>,
    ) -> Result<ClientPolicy, Problem> {
        let (auth, client_ca) = (self.client_auth(), self.pem("client_ca"));
        let pem = client_ca.as_ref().map(Pem::read).transpose()?;
        let pem = pem.unwrap_or_default();
        // As in Go, what is no certificate is skipped …
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem).flatten().collect();
        let all = certificates.len();
        let sans = self.section.client_allowed_sans.clone();
        let policy = ClientPolicy::new(auth, certificates, sans, provider)
            .map_err(|error| refuse(self.line, format_args!(": {error}")))?;
        let usable = policy.authorities();
        match client_ca {
            // … but there has to be one.
            Some(client_ca) if usable == 0 => {
                return Err(client_ca.refuse("no usable PEM certificate in it"));
            }
            Some(_) if usable < all => {
                let skipped = all - usable;
                remarks.push(format!("{skipped} client CA certificates were not usable"));
            }
            None if auth.verifies() => {
                let remark = "client certificates are verified but client_ca_file is not set: \
                              every one is refused (the system's CAs are not asked)";
                remarks.push(remark.to_owned());
            }
            _ => {}
        }
        Ok(policy)
    }
}

fn refuse(line: usize, what: impl Display) -> Problem {
    Problem::new(line, format_args!("tls_server_config{what}"))
}

fn list(suites: &[Suite]) -> String {
    let names: Vec<_> = suites.iter().map(|suite| format!("{suite:?}")).collect();
    names.join(", ")
}

/// PEM text, or the file that has it.
struct Pem {
    /// The key in `tls_server_config`; that of a file has `_file` appended.
    key: &'static str,
    line: usize,
    text: String,
    path: Option<PathBuf>,
}

impl Pem {
    fn read(&self) -> Result<Vec<u8>, Problem> {
        let Some(path) = &self.path else {
            return Ok(self.text.clone().into_bytes());
        };
        read_file(path, MAX_PEM_BYTES).map_err(|error| Problem {
            not_yet: is_state_of_host(error.raw_os_error()),
            ..self.refuse(format_args!("cannot read: {error}"))
        })
    }

    fn refuse(&self, why: impl Display) -> Problem {
        let key = self.key;
        match &self.path {
            None => refuse(self.line, format_args!(".{key}: {why}")),
            Some(path) => {
                let path = path.display();
                refuse(self.line, format_args!(".{key}_file: {path}: {why}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suite_of_rustls_has_a_name_in_go() {
        for suite in ring::ALL_CIPHER_SUITES {
            let name = format!("{:?}", suite.suite()).replacen("TLS13_", "TLS_", 1);
            let name = serde_json::Value::from(name);
            let named: Suite = serde_json::from_value(name).unwrap();
            assert_eq!(named.available(), Some(*suite));
        }
        let curves = [Curve::CurveP256, Curve::CurveP384, Curve::X25519];
        let available = curves.into_iter().filter_map(|curve| curve.available());
        assert_eq!(available.count(), ring::DEFAULT_KX_GROUPS.len());
    }
}
