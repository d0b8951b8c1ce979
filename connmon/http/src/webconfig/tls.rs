//! `tls_server_config`: what may be written there, and the rustls
//! configuration that it stands for (ring provider). [`TlsSettings::new`]
//! judges the text alone, [`TlsSettings::load`] reads certificates and keys.

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
#[derive(Default, Deserialize)]
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

impl TlsSection {
    /// What the section leaves of suites, curves and versions.
    fn choose(
        &self,
        line: usize,
        http2: bool,
        remarks: &mut Vec<String>,
    ) -> Result<(Arc<CryptoProvider>, Vec<&'static SupportedProtocolVersion>), Problem> {
        let min_version = self.min_version.unwrap_or(Version::TLS12);
        let max_version = self.max_version.unwrap_or(Version::TLS13);
        let speaks = |version| min_version <= version && max_version >= version;
        let (mut tls12, tls13) = (speaks(Version::TLS12), speaks(Version::TLS13));
        if !tls12 && !tls13 {
            let what = ": no version is left between min_version and max_version; connmon speaks \
                        TLS12 and TLS13";
            return Err(refuse(line, what));
        }
        if min_version < Version::TLS12 {
            remarks.push("min_version is below TLS12: TLS 1.2 is the oldest spoken".to_owned());
        }
        let mut provider = ring::default_provider();
        if let Some(Located {
            line,
            value: listed,
        }) = &self.cipher_suites
            && !listed.is_empty()
        {
            let required = HTTP2_SUITES.iter().any(|suite| listed.contains(suite));
            if http2 && min_version < Version::TLS13 && !required {
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
        let curves = self.curve_preferences.as_deref().unwrap_or_default();
        let available: Vec<_> = curves.iter().filter_map(Curve::available).collect();
        if available.len() < curves.len() {
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
}

/// A complete `tls_server_config`: there is a certificate and a key.
#[derive(Clone)]
pub(super) struct TlsSettings {
    line: usize,
    certificate: Pem,
    key: Pem,
    client_ca: Option<Pem>,
    client_auth: ClientAuth,
    allowed_sans: Option<Vec<String>>,
    provider: Arc<CryptoProvider>,
    versions: Vec<&'static SupportedProtocolVersion>,
    prefer_server_order: bool,
    http2: bool,
}

impl TlsSettings {
    /// Judges the section, whose relative paths start from `directory`; `None`
    /// if nothing in it switches TLS on. `remarks` gets what the file asks for
    /// and does not get.
    pub(super) fn new(
        section: Located<TlsSection>,
        directory: &Path,
        http2: bool,
        remarks: &mut Vec<String>,
    ) -> Result<Option<Self>, Problem> {
        let Located {
            line,
            value: mut section,
        } = section;
        let pem = |key, text: &mut Option<_>, file: &mut Option<_>| {
            Pem::new(key, text.take(), file.take(), directory)
        };
        let certificate = pem("cert", &mut section.cert, &mut section.cert_file);
        let key = pem("key", &mut section.key, &mut section.key_file);
        let client_ca = pem(
            "client_ca",
            &mut section.client_ca,
            &mut section.client_ca_file,
        );
        let pems = [&certificate, &key, &client_ca];
        if pems.iter().all(|pem| pem.is_none()) && section.client_auth_type.is_none() {
            return Ok(None);
        }
        let missing = |keys| refuse(line, format_args!(": missing one of {keys}"));
        let certificate = certificate.ok_or_else(|| missing("cert or cert_file"))?;
        let key = key.ok_or_else(|| missing("key or key_file"))?;
        let client_auth = section.client_auth_type.unwrap_or(ClientAuth::NoClientCert);
        if let (Some(ca), ClientAuth::NoClientCert) = (&client_ca, client_auth) {
            let why = "client CA's have been configured without a client_auth_type that uses them";
            return Err(ca.refuse(why));
        }
        if section.client_allowed_sans.is_some() && !client_auth.is_mandatory() {
            let what = ".client_allowed_sans: requires client_auth_type to be RequireAnyClientCert \
                        or RequireAndVerifyClientCert; with any other a client need not show a \
                        certificate";
            return Err(refuse(line, what));
        }
        let (provider, versions) = section.choose(line, http2, remarks)?;
        Ok(Some(Self {
            line,
            certificate,
            key,
            client_ca,
            client_auth,
            allowed_sans: section.client_allowed_sans,
            provider,
            versions,
            prefer_server_order: section.prefer_server_cipher_suites.unwrap_or(true),
            http2,
        }))
    }

    /// Every file named.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        let pems = [
            Some(&self.certificate),
            Some(&self.key),
            self.client_ca.as_ref(),
        ];
        pems.into_iter()
            .flatten()
            .filter_map(|pem| pem.path.as_deref())
    }

    /// Reads certificate, key and client CAs.
    pub(super) fn load(&self, remarks: &mut Vec<String>) -> Result<Arc<ServerConfig>, Problem> {
        let builder = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&self.versions)
            .map_err(|error| refuse(self.line, format_args!(": {error}")))?;
        let builder = if self.client_auth == ClientAuth::NoClientCert {
            builder.with_no_client_auth()
        } else {
            builder.with_client_cert_verifier(Arc::new(self.client_policy(remarks)?))
        };
        let resolver = SingleCertAndKey::from(self.certified_key()?);
        let mut config = builder.with_cert_resolver(Arc::new(resolver));
        config.ignore_client_order = self.prefer_server_order;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        if self.http2 {
            config.alpn_protocols.insert(0, b"h2".to_vec());
        }
        Ok(Arc::new(config))
    }

    fn certified_key(&self) -> Result<CertifiedKey, Problem> {
        let refuse = |why: &dyn Display| self.certificate.refuse(why);
        let pem = self.certificate.read()?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&pem)
            .collect::<Result<_, _>>()
            .map_err(|error| refuse(&format_args!("bad PEM: {error:?}")))?;
        let first = chain.first();
        let first = first.ok_or_else(|| refuse(&"no PEM certificate in it"))?;
        // rustls would refuse an unknown critical extension.
        let (_, certificate) = X509Certificate::from_der(first)
            .map_err(|error| refuse(&format_args!("bad certificate: {error}")))?;
        let public = certificate.public_key().raw;

        let refuse = |why: &dyn Display| self.key.refuse(why);
        let pem = self.key.read()?;
        let labelled = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| match error {
            PemError::NoItemsFound => {
                refuse(&"no PEM private key in it (an encrypted one cannot be used)")
            }
            error => refuse(&format_args!("bad PEM: {error:?}")),
        })?;
        // The label may be wrong; the content decides.
        let key = PrivateKeyDer::try_from(labelled.secret_der())
            .map_err(|_| refuse(&"the private key is neither PKCS#1, PKCS#8 nor SEC1"))?;
        let loaded = self.provider.key_provider.load_private_key(key.clone_key());
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

    fn client_policy(&self, remarks: &mut Vec<String>) -> Result<ClientPolicy, Problem> {
        let pem = self.client_ca.as_ref().map(Pem::read).transpose()?;
        let pem = pem.unwrap_or_default();
        // As in Go, what is no certificate is skipped …
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem).flatten().collect();
        let all = certificates.len();
        let sans = self.allowed_sans.clone();
        let policy = ClientPolicy::new(self.client_auth, certificates, sans, &self.provider)
            .map_err(|error| refuse(self.line, format_args!(": {error}")))?;
        let usable = policy.authorities();
        match &self.client_ca {
            // … but there has to be one.
            Some(client_ca) if usable == 0 => {
                return Err(client_ca.refuse("no usable PEM certificate in it"));
            }
            Some(_) if usable < all => {
                let skipped = all - usable;
                remarks.push(format!("{skipped} client CA certificates were not usable"));
            }
            None if self.client_auth.verifies() => {
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

/// PEM text: `key` in `tls_server_config` has it, or `key` with `_file` names
/// the file that has it.
#[derive(Clone)]
struct Pem {
    key: &'static str,
    line: usize,
    text: String,
    path: Option<PathBuf>,
}

impl Pem {
    /// Where both are given the file counts. An empty value is not given.
    fn new(
        key: &'static str,
        text: Option<Located<String>>,
        file: Option<Located<String>>,
        directory: &Path,
    ) -> Option<Self> {
        let file = file.filter(|it| !it.value.is_empty());
        let path = file.as_ref().map(|it| directory.join(&it.value));
        let given = file.or(text.filter(|it| !it.value.is_empty()))?;
        Some(Self {
            key,
            line: given.line,
            text: given.value,
            path,
        })
    }

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
