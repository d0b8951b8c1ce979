//! Which client certificates are let in: Go's five policies and the list of
//! allowed subject alternative names.

use std::net::IpAddr;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};
use x509_parser::prelude::{FromDer as _, GeneralName, ParsedExtension, X509Certificate};

use super::settings::ClientAuth;

/// The verifier of a `client_auth_type` other than `NoClientCert`.
#[derive(Debug)]
pub(super) struct ClientPolicy {
    mandatory: bool,
    /// Whether the chain has to lead to an authority.
    verify: bool,
    /// `None` where there are no authorities: nothing verifies.
    chains: Option<Arc<dyn ClientCertVerifier>>,
    authorities: Vec<CertificateDer<'static>>,
    hints: Vec<DistinguishedName>,
    allowed_sans: Option<Vec<String>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientPolicy {
    pub(super) fn new(
        auth: ClientAuth,
        authorities: Vec<CertificateDer<'static>>,
        allowed_sans: Option<Vec<String>>,
        provider: &CryptoProvider,
    ) -> Result<Self, String> {
        let verify = matches!(
            auth,
            ClientAuth::VerifyIfGiven | ClientAuth::RequireAndVerify
        );
        let mandatory = matches!(auth, ClientAuth::RequireAny | ClientAuth::RequireAndVerify);
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(authorities.iter().cloned());
        let hints = roots.subjects();
        let chains = if roots.is_empty() {
            None
        } else {
            let builder = WebPkiClientVerifier::builder_with_provider(
                Arc::new(roots),
                Arc::new(provider.clone()),
            );
            Some(builder.build().map_err(|error| error.to_string())?)
        };
        Ok(Self {
            mandatory,
            verify,
            chains,
            authorities,
            hints,
            allowed_sans,
            algorithms: provider.signature_verification_algorithms,
        })
    }

    /// Whether a certificate can be an authority here.
    pub(super) fn is_usable_authority(der: &CertificateDer<'_>) -> bool {
        RootCertStore::empty().add(der.clone().into_owned()).is_ok()
    }

    /// As in Go, a certificate that is itself in the list of authorities
    /// needs no chain (a self-signed client certificate, be it marked as a
    /// CA or not), only to be in its time and meant for clients.
    fn is_trusted_itself(&self, certificate: &CertificateDer<'_>, now: UnixTime) -> bool {
        self.authorities.contains(certificate)
            && X509Certificate::from_der(certificate).is_ok_and(|(_, parsed)| {
                let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
                let validity = parsed.validity();
                let in_time = (validity.not_before.timestamp()..=validity.not_after.timestamp())
                    .contains(&now);
                let for_clients = match parsed.extended_key_usage() {
                    Ok(None) => true,
                    Ok(Some(usage)) => usage.value.any || usage.value.client_auth,
                    Err(_) => false,
                };
                in_time && for_clients
            })
    }

    fn check_sans(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let Some(allowed) = &self.allowed_sans else {
            return Ok(());
        };
        let names = subject_names(certificate).ok_or(CertificateError::BadEncoding)?;
        if names.iter().any(|name| allowed.contains(name)) {
            return Ok(());
        }
        log::debug!("client certificate refused: none of {names:?} is in client_allowed_sans");
        Err(CertificateError::ApplicationVerificationFailure.into())
    }
}

/// DNS names, e-mail addresses, IP addresses and URIs of the certificate.
fn subject_names(certificate: &CertificateDer<'_>) -> Option<Vec<String>> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let mut names = Vec::new();
    for extension in certificate.extensions() {
        let ParsedExtension::SubjectAlternativeName(subject) = extension.parsed_extension() else {
            continue;
        };
        for name in &subject.general_names {
            match name {
                GeneralName::DNSName(text)
                | GeneralName::RFC822Name(text)
                | GeneralName::URI(text) => names.push((*text).to_owned()),
                GeneralName::IPAddress(bytes) => {
                    let address = <[u8; 4]>::try_from(*bytes)
                        .map(IpAddr::from)
                        .or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
                    if let Ok(address) = address {
                        names.push(address.to_canonical().to_string());
                    }
                }
                _ => {}
            }
        }
    }
    Some(names)
}

impl ClientCertVerifier for ClientPolicy {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if self.verify && !self.is_trusted_itself(certificate, now) {
            let Some(chains) = &self.chains else {
                return Err(CertificateError::UnknownIssuer.into());
            };
            chains.verify_client_cert(certificate, intermediates, now)?;
        }
        self.check_sans(certificate)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
