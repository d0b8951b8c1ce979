//! Which client certificates are accepted: the five policies of Go's
//! `crypto/tls`, and the toolkit's list of subject alternative names.

use std::net::IpAddr;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};
use serde::Deserialize;
use x509_parser::prelude::{ASN1Time, FromDer as _, GeneralName, X509Certificate};

/// `client_auth_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) enum ClientAuth {
    NoClientCert,
    RequestClientCert,
    /// `RequireClientCert` is its old name.
    #[serde(alias = "RequireClientCert")]
    RequireAnyClientCert,
    VerifyClientCertIfGiven,
    RequireAndVerifyClientCert,
}

impl ClientAuth {
    /// Whether a client has to show a certificate.
    pub(super) fn is_mandatory(self) -> bool {
        matches!(
            self,
            Self::RequireAnyClientCert | Self::RequireAndVerifyClientCert
        )
    }

    /// Whether the chain has to lead to one of the client CAs.
    pub(super) fn verifies(self) -> bool {
        matches!(
            self,
            Self::VerifyClientCertIfGiven | Self::RequireAndVerifyClientCert
        )
    }
}

/// The verifier of a `client_auth_type` other than `NoClientCert`.
#[derive(Debug)]
pub(super) struct ClientPolicy {
    auth: ClientAuth,
    authorities: Vec<CertificateDer<'static>>,
    /// `None` where there are no authorities: nothing verifies.
    chains: Option<Arc<dyn ClientCertVerifier>>,
    allowed_sans: Option<Vec<String>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientPolicy {
    /// Certificates that cannot be an authority are skipped.
    pub(super) fn new(
        auth: ClientAuth,
        mut authorities: Vec<CertificateDer<'static>>,
        allowed_sans: Option<Vec<String>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, VerifierBuilderError> {
        let mut roots = RootCertStore::empty();
        authorities.retain(|der| roots.add(der.clone()).is_ok());
        let chains =
            WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(provider));
        let chains = (!authorities.is_empty()).then(|| chains.build());
        Ok(Self {
            auth,
            authorities,
            chains: chains.transpose()?,
            allowed_sans,
            algorithms: provider.signature_verification_algorithms,
        })
    }

    /// How many certificates can be an authority.
    pub(super) fn authorities(&self) -> usize {
        self.authorities.len()
    }

    /// As in Go, a certificate that is itself in the list of authorities
    /// needs no chain (a self-signed client certificate, marked as a CA or
    /// not). It has to be valid now and meant for clients.
    fn is_trusted_itself(&self, certificate: &CertificateDer<'_>, now: UnixTime) -> bool {
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let Ok(now) = ASN1Time::from_timestamp(now) else {
            return false;
        };
        self.authorities.contains(certificate)
            && X509Certificate::from_der(certificate).is_ok_and(|(_, parsed)| {
                let usage = parsed.extended_key_usage();
                let for_clients = usage.is_ok_and(|usage| {
                    usage.is_none_or(|usage| usage.value.any || usage.value.client_auth)
                });
                parsed.validity().is_valid_at(now) && for_clients
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
    let subject = certificate.subject_alternative_name().ok()?;
    let names = subject.iter().flat_map(|it| &it.value.general_names);
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(text) | GeneralName::RFC822Name(text) | GeneralName::URI(text) => {
            Some((*text).to_owned())
        }
        GeneralName::IPAddress(bytes) => {
            let ipv4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            let address = ipv4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
            Some(address.ok()?.to_canonical().to_string())
        }
        _ => None,
    };
    Some(names.filter_map(text).collect())
}

impl ClientCertVerifier for ClientPolicy {
    fn client_auth_mandatory(&self) -> bool {
        self.auth.is_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        let chains = self.chains.as_ref();
        chains.map_or(&[], |chains| chains.root_hint_subjects())
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if self.auth.verifies() && !self.is_trusted_itself(certificate, now) {
            let chains = self
                .chains
                .as_ref()
                .ok_or(CertificateError::UnknownIssuer)?;
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
