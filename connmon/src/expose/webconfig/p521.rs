//! ECDHE over P-521 for rustls, whose ring provider lacks it: a web
//! configuration may name `CurveP521` alone. Used only when it is named.

use p521::ecdh::diffie_hellman;
use p521::elliptic_curve::sec1::ToEncodedPoint as _;
use p521::{PublicKey, SecretKey};
use ring::rand::{SecureRandom as _, SystemRandom};
use rustls::crypto::{ActiveKeyExchange, GetRandomFailed, SharedSecret, SupportedKxGroup};
use rustls::{Error, NamedGroup, PeerMisbehaved};

/// The group secp521r1 (RFC 8446, 4.2.7).
pub(super) static SECP521R1: &dyn SupportedKxGroup = &Secp521r1;

#[derive(Debug)]
struct Secp521r1;

impl SupportedKxGroup for Secp521r1 {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        let secret = random_secret()?;
        let public = secret.public_key().to_encoded_point(false);
        Ok(Box::new(Exchange {
            secret,
            public: public.as_bytes().into(),
        }))
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}

/// A secret key, by rejection: nearly every second 521-bit number is one.
fn random_secret() -> Result<SecretKey, Error> {
    let random = SystemRandom::new();
    let mut bytes = [0; 66];
    loop {
        random
            .fill(&mut bytes)
            .map_err(|_| Error::from(GetRandomFailed))?;
        // 521 bits: one in the first byte.
        bytes[0] &= 1;
        if let Ok(secret) = SecretKey::from_slice(&bytes) {
            return Ok(secret);
        }
    }
}

struct Exchange {
    secret: SecretKey,
    public: Box<[u8]>,
}

impl ActiveKeyExchange for Exchange {
    fn complete(self: Box<Self>, peer: &[u8]) -> Result<SharedSecret, Error> {
        // TLS knows only the uncompressed form; from_sec1_bytes checks that
        // the point is on the curve and not the identity.
        if peer.first() != Some(&4) {
            return Err(PeerMisbehaved::InvalidKeyShare.into());
        }
        let peer = PublicKey::from_sec1_bytes(peer)
            .map_err(|_| Error::from(PeerMisbehaved::InvalidKeyShare))?;
        let shared = diffie_hellman(self.secret.to_nonzero_scalar(), peer.as_affine());
        Ok(SharedSecret::from(&shared.raw_secret_bytes()[..]))
    }

    fn pub_key(&self) -> &[u8] {
        &self.public
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_agree_and_nonsense_is_refused() {
        let ours = SECP521R1.start().unwrap();
        let theirs = SECP521R1.start().unwrap();
        assert_eq!(ours.pub_key().len(), 133);
        let (our_key, their_key) = (ours.pub_key().to_vec(), theirs.pub_key().to_vec());
        let ours = ours.complete(&their_key).unwrap();
        let theirs = theirs.complete(&our_key).unwrap();
        assert_eq!(ours.secret_bytes(), theirs.secret_bytes());
        assert_eq!(ours.secret_bytes().len(), 66);
        let mut off_curve = our_key.clone();
        off_curve[100] ^= 1;
        let compressed = [&[2 + (our_key[132] & 1)], &our_key[1..67]].concat();
        for bad in [&[][..], &[4], &[0], &[4; 133], &off_curve, &compressed] {
            assert!(SECP521R1.start().unwrap().complete(bad).is_err());
        }
    }
}
