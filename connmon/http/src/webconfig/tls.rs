//! `tls_server_config` → a rustls configuration (ring provider).

use std::fmt::Display;
use std::sync::Arc;

use crate::read_file::read_file;
use rustls::crypto::ring::{self, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, SupportedCipherSuite, SupportedProtocolVersion, version};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::is_state_of_host;
use crate::yaml::Problem;

use super::clients::ClientPolicy;
use super::settings::{ClientAuth, Pem, Source, TlsSettings, Version};

/// Largest certificate or key file, bytes.
pub(super) const MAX_PEM_BYTES: u64 = 1 << 20;

/// The private keys that ring and rustls take.
const KEYS: &str = "connmon takes RSA keys of 2048 to 8192 bits, ECDSA keys of the curves P-256 and \
                    P-384, and Ed25519 keys";

/// What a TLS configuration comes down to, with what is to be said about it.
pub(super) struct Chosen {
    provider: CryptoProvider,
    versions: Vec<&'static SupportedProtocolVersion>,
    /// For the log, once: what the file asks for and does not get.
    pub(super) remarks: Vec<String>,
}

impl TlsSettings {
    /// Versions, suites and curves, out of the file alone.
    pub(super) fn choose(&self) -> Result<Chosen, Problem> {
        let mut remarks = Vec::new();
        let mut provider = ring::default_provider();
        let mut tls12 = self.min_version <= Version::Tls12 && self.max_version >= Version::Tls12;
        let tls13 = self.min_version <= Version::Tls13 && self.max_version >= Version::Tls13;
        if !tls12 && !tls13 {
            return Err(Problem::new(
                self.line,
                "tls_server_config: no version is left between min_version and max_version; \
                 connmon speaks TLS12 and TLS13",
            ));
        }
        if self.min_version < Version::Tls12 {
            remarks.push("min_version is below TLS12: TLS 1.2 is the oldest spoken".to_owned());
        }
        if !self.cipher_suites.value.is_empty() {
            let mut suites: Vec<SupportedCipherSuite> = Vec::new();
            let mut absent = Vec::new();
            for name in &self.cipher_suites.value {
                match cipher_suite(name) {
                    Some(suite) => suites.push(suite),
                    None => absent.push(*name),
                }
            }
            if !absent.is_empty() {
                let names = absent.join(", ");
                remarks.push(format!("cipher suites not available and left out: {names}"));
            }
            suites.retain(|suite| suite.tls13().is_none());
            if tls12 && suites.is_empty() {
                if !tls13 {
                    return Err(Problem::new(
                        self.cipher_suites.line,
                        format_args!(
                            "tls_server_config.cipher_suites: none of {} is available; the ECDHE \
                             suites with GCM or CHACHA20_POLY1305 are",
                            self.cipher_suites.value.join(", ")
                        ),
                    ));
                }
                tls12 = false;
                remarks.push("no cipher suite is left for TLS 1.2: only TLS 1.3 is spoken".into());
            }
            // As in Go, the list is about TLS 1.2; those of 1.3 are fixed.
            let mut all: Vec<_> = provider.cipher_suites.clone();
            all.retain(|suite| suite.tls13().is_some());
            all.extend(suites);
            provider.cipher_suites = all;
        }
        let curves: Vec<_> = self.curves.iter().filter_map(|name| curve(name)).collect();
        if curves.len() < self.curves.len() {
            remarks.push(
                "CurveP521 is not available and left out of curve_preferences; alone it leaves the \
                 default curves"
                    .to_owned(),
            );
        }
        if !curves.is_empty() {
            provider.kx_groups = curves;
        }
        let mut versions = Vec::new();
        if tls13 {
            versions.push(&version::TLS13);
        }
        if tls12 {
            versions.push(&version::TLS12);
        }
        Ok(Chosen {
            provider,
            versions,
            remarks,
        })
    }

    /// Reads certificate, key and client CAs, and makes the configuration.
    pub(super) fn load(&self, http2: bool) -> Result<(Arc<ServerConfig>, Vec<String>), Problem> {
        let chosen = self.choose()?;
        let provider = Arc::new(chosen.provider);
        let mut remarks = chosen.remarks;
        let refuse = |error: rustls::Error| {
            Problem::new(self.line, format_args!("tls_server_config: {error}"))
        };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&chosen.versions)
            .map_err(refuse)?;
        let builder = if self.client_auth == ClientAuth::None {
            builder.with_no_client_auth()
        } else {
            let policy = self.client_policy(&provider, &mut remarks)?;
            builder.with_client_cert_verifier(Arc::new(policy))
        };
        let certified = self.certified_key(&provider)?;
        let resolver = rustls::sign::SingleCertAndKey::from(certified);
        let mut config = builder.with_cert_resolver(Arc::new(resolver));
        config.ignore_client_order = self.prefer_server_order;
        config.alpn_protocols = if http2 {
            vec![b"h2".to_vec(), b"http/1.1".to_vec()]
        } else {
            vec![b"http/1.1".to_vec()]
        };
        Ok((Arc::new(config), remarks))
    }

    fn certified_key(&self, provider: &CryptoProvider) -> Result<CertifiedKey, Problem> {
        let pem = self.certificate.read()?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&pem)
            .collect::<Result<_, _>>()
            .map_err(|error| self.certificate.bad(&error))?;
        let Some(first) = chain.first() else {
            return Err(self.certificate.refuse("no PEM certificate in it"));
        };
        let (_, certificate) = X509Certificate::from_der(first).map_err(|error| {
            self.certificate
                .refuse(format_args!("bad certificate: {error}"))
        })?;
        let public = certificate.public_key().raw.to_vec();
        let pem = self.key.read()?;
        let labelled = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| self.key.bad(&error))?;
        // What it is, whatever its label says.
        let key = PrivateKeyDer::try_from(labelled.secret_der()).map_err(|_| {
            self.key
                .refuse("the private key is in no form of PKCS#1, PKCS#8 or SEC1")
        })?;
        let key = provider
            .key_provider
            .load_private_key(key.clone_key())
            .map_err(|_| {
                self.key
                    .refuse(format_args!("the private key cannot be used: {KEYS}"))
            })?;
        if key.public_key().is_some_and(|key| *key != *public) {
            return Err(self
                .key
                .refuse("the private key does not match the certificate"));
        }
        Ok(CertifiedKey::new(chain, key))
    }

    fn client_policy(
        &self,
        provider: &CryptoProvider,
        remarks: &mut Vec<String>,
    ) -> Result<ClientPolicy, Problem> {
        let mut authorities = Vec::new();
        if let Some(client_ca) = &self.client_ca {
            let pem = client_ca.read()?;
            // As in Go, what is no certificate is skipped …
            authorities = CertificateDer::pem_slice_iter(&pem).flatten().collect();
            let before = authorities.len();
            authorities.retain(|der| ClientPolicy::is_usable_authority(der));
            // … but there has to be one.
            if authorities.is_empty() {
                return Err(client_ca.refuse("no usable PEM certificate in it"));
            }
            if authorities.len() < before {
                let skipped = before - authorities.len();
                remarks.push(format!("{skipped} client CA certificates were not usable"));
            }
        } else if matches!(
            self.client_auth,
            ClientAuth::VerifyIfGiven | ClientAuth::RequireAndVerify
        ) {
            remarks.push(
                "client certificates are verified but client_ca_file is not set: every one shown \
                 will be refused (the system's CAs are not asked)"
                    .to_owned(),
            );
        }
        ClientPolicy::new(
            self.client_auth,
            authorities,
            self.allowed_sans.clone(),
            provider,
        )
        .map_err(|error| Problem::new(self.line, format_args!("tls_server_config: {error}")))
    }
}

impl Pem {
    /// The PEM text.
    fn read(&self) -> Result<Vec<u8>, Problem> {
        match &self.source {
            Source::Text(text) => Ok(text.clone().into_bytes()),
            Source::File(path) => read_file(path, MAX_PEM_BYTES).map_err(|error| Problem {
                not_yet: is_state_of_host(error.raw_os_error()),
                ..self.refuse(format_args!("cannot read: {error}"))
            }),
        }
    }

    fn refuse(&self, why: impl Display) -> Problem {
        let path = match &self.source {
            Source::Text(_) => String::new(),
            Source::File(path) => format!("{}: ", path.display()),
        };
        let text = format_args!("tls_server_config.{}: {path}{why}", self.key);
        Problem::new(self.line, text)
    }

    fn bad(&self, error: &PemError) -> Problem {
        match error {
            PemError::NoItemsFound => {
                self.refuse("no PEM private key in it (an encrypted one cannot be used)")
            }
            error => self.refuse(format_args!("bad PEM: {error:?}")),
        }
    }
}

/// The suite that Go calls so; rustls marks those of TLS 1.3.
fn cipher_suite(name: &str) -> Option<SupportedCipherSuite> {
    let mut suites = ring::ALL_CIPHER_SUITES.iter();
    let go_name = |suite: &SupportedCipherSuite| match suite.suite().as_str() {
        Some(name) => name.replacen("TLS13_", "TLS_", 1),
        None => String::new(),
    };
    suites.find(|suite| go_name(suite) == name).copied()
}

/// The curve that Go calls so.
fn curve(name: &str) -> Option<&'static dyn SupportedKxGroup> {
    match name {
        "CurveP256" => Some(kx_group::SECP256R1),
        "CurveP384" => Some(kx_group::SECP384R1),
        "X25519" => Some(kx_group::X25519),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::settings::{CIPHER_SUITES, CURVES};
    use super::*;

    #[test]
    fn every_suite_and_curve_of_rustls_has_its_name() {
        let suites = CIPHER_SUITES.iter().filter_map(|name| cipher_suite(name));
        assert_eq!(suites.count(), ring::ALL_CIPHER_SUITES.len());
        let curves = CURVES.iter().filter_map(|name| curve(name));
        assert_eq!(curves.count(), ring::DEFAULT_KX_GROUPS.len());
    }
}
