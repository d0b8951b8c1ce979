//! `tls_server_config` → a rustls configuration (ring provider).

use std::sync::Arc;

use rustls::crypto::ring::{self, cipher_suite as suite, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, SupportedCipherSuite, SupportedProtocolVersion, version};
use x509_parser::prelude::{FromDer as _, X509Certificate, X509Version};

use super::clients::ClientPolicy;
use super::p521::SECP521R1;
use super::settings::{ClientAuth, Source, TlsSettings, Version};
use super::yaml::Problem;
use crate::read_file::read_file;

/// Largest certificate or key file, bytes.
pub(super) const MAX_PEM_BYTES: u64 = 1 << 20;

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
                    None => absent.push(name.as_str()),
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
        if !self.curves.value.is_empty() {
            provider.kx_groups = self.curves.value.iter().map(|name| curve(name)).collect();
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
        let pem = self.certificate.read("cert_file")?;
        let refuse = |source: &Source, what: &str, why: &dyn std::fmt::Display| {
            let (file, path) = source.named(what);
            Problem::new(
                source.line(),
                format_args!("tls_server_config.{file}: {path}{why}"),
            )
        };
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&pem)
            .collect::<Result<_, _>>()
            .map_err(|error| refuse(&self.certificate, "cert", &pem_error(&error)))?;
        if chain.is_empty() {
            return Err(refuse(
                &self.certificate,
                "cert",
                &"no PEM certificate in it",
            ));
        }
        let pem = self.key.read("key_file")?;
        let key = PrivateKeyDer::from_pem_slice(&pem)
            .map_err(|error| refuse(&self.key, "key", &pem_error(&error)))?;
        let key = provider
            .key_provider
            .load_private_key(key)
            .map_err(|error| refuse(&self.key, "key", &error))?;
        let certified = CertifiedKey::new(chain, key);
        let mismatch = || {
            let why = "private key does not match the certificate";
            refuse(&self.key, "key", &why)
        };
        // Parses the certificate, too.
        match certified.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {
                Ok(certified)
            }
            Err(rustls::Error::InconsistentKeys(_)) => Err(mismatch()),
            Err(error) => match outside_webpki(&certified) {
                Some(true) => Ok(certified),
                Some(false) => Err(mismatch()),
                None => Err(refuse(&self.certificate, "cert", &error)),
            },
        }
    }

    fn client_policy(
        &self,
        provider: &CryptoProvider,
        remarks: &mut Vec<String>,
    ) -> Result<ClientPolicy, Problem> {
        let mut authorities = Vec::new();
        if let Some(source) = &self.client_ca {
            let pem = source.read("client_ca_file")?;
            let (file, path) = source.named("client_ca");
            // As in Go, what is no certificate is skipped …
            authorities = CertificateDer::pem_slice_iter(&pem).flatten().collect();
            let before = authorities.len();
            authorities.retain(|der| ClientPolicy::is_usable_authority(der));
            // … but there has to be one.
            if authorities.is_empty() {
                return Err(Problem::new(
                    source.line(),
                    format_args!("tls_server_config.{file}: {path}no usable PEM certificate in it"),
                ));
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

impl Source {
    /// The PEM text.
    fn read(&self, key: &str) -> Result<Vec<u8>, Problem> {
        match self {
            Self::Text(text) => Ok(text.value.clone().into_bytes()),
            Self::File(path) => read_file(&path.value, MAX_PEM_BYTES).map_err(|error| {
                Problem::new(
                    path.line,
                    format_args!(
                        "tls_server_config.{key}: failed to read {}: {error}",
                        path.value.display()
                    ),
                )
            }),
        }
    }

    /// Which of the two keys this is, and the path for a message.
    fn named(&self, key: &str) -> (String, String) {
        match self {
            Self::Text(_) => (key.to_owned(), String::new()),
            Self::File(path) => (format!("{key}_file"), format!("{}: ", path.value.display())),
        }
    }
}

/// Whether the key is that of a certificate which webpki does not read and
/// Go does: of X.509 v1 or v2, or with a critical extension, which only
/// clients have to understand. `None` where the certificate is no such one.
fn outside_webpki(certified: &CertifiedKey) -> Option<bool> {
    let (_, certificate) = X509Certificate::from_der(certified.cert.first()?).ok()?;
    let critical = certificate.extensions().iter().any(|one| one.critical);
    if certificate.version() == X509Version::V3 && !critical {
        return None;
    }
    let spki = certified.key.public_key()?;
    Some(*spki == *certificate.public_key().raw)
}

fn pem_error(error: &rustls::pki_types::pem::Error) -> String {
    match error {
        rustls::pki_types::pem::Error::NoItemsFound => {
            "no PEM private key in it (an encrypted one cannot be used)".to_owned()
        }
        error => format!("bad PEM: {error:?}"),
    }
}

fn cipher_suite(name: &str) -> Option<SupportedCipherSuite> {
    Some(match name {
        "TLS_AES_128_GCM_SHA256" => suite::TLS13_AES_128_GCM_SHA256,
        "TLS_AES_256_GCM_SHA384" => suite::TLS13_AES_256_GCM_SHA384,
        "TLS_CHACHA20_POLY1305_SHA256" => suite::TLS13_CHACHA20_POLY1305_SHA256,
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256" => suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384" => suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256" => {
            suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
        }
        "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256" => suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384" => suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256" => {
            suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256
        }
        _ => return None,
    })
}

/// `name` is one of [`super::settings::CURVES`].
fn curve(name: &str) -> &'static dyn SupportedKxGroup {
    match name {
        "CurveP256" => kx_group::SECP256R1,
        "CurveP384" => kx_group::SECP384R1,
        "CurveP521" => SECP521R1,
        _ => kx_group::X25519,
    }
}

#[cfg(test)]
mod tests {
    use super::super::settings::{CIPHER_SUITES, CURVES};
    use super::*;

    #[test]
    fn every_name_means_what_it_says() {
        let available = CIPHER_SUITES.iter().filter_map(|name| {
            let suite = format!("{:?}", cipher_suite(name)?.suite());
            Some((*name, suite.replacen("TLS13_", "TLS_", 1)))
        });
        let mut count = 0;
        for (name, suite) in available {
            assert_eq!(name, suite);
            count += 1;
        }
        assert_eq!(count, ring::ALL_CIPHER_SUITES.len());
        for name in CURVES {
            let group = format!("{:?}", curve(name).name()).to_lowercase();
            let digits: String = name.chars().filter(char::is_ascii_digit).collect();
            assert!(group.contains(&digits), "{name} {group}");
        }
    }
}
