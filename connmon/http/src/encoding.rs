//! Which content coding a client wants, and gzip.

use std::io::Write as _;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use hyper::header::{ACCEPT_ENCODING, HeaderMap};

/// Bodies shorter than this (bytes) are sent as they are: gzip would not make
/// them fit fewer packets.
pub(crate) const WORTH_COMPRESSING: usize = 512;

/// Whether the client prefers gzip to the plain body (RFC 9110, 12.5.3): it
/// names gzip (or `*`) with a weight above zero and not below the one it gives
/// `identity`. A weight that is not from 0 to 1 counts as 0.
pub(crate) fn wants_gzip(headers: &HeaderMap) -> bool {
    let (mut gzip, mut identity, mut any) = (None, None, None);
    let values = headers.get_all(ACCEPT_ENCODING).iter();
    let values = values.filter_map(|value| value.to_str().ok());
    for item in values.flat_map(|value| value.split(',')) {
        let (coding, parameters) = item.split_once(';').unwrap_or((item, ""));
        let parameters = parameters.split(';').map(str::trim);
        let mut weights =
            parameters.filter_map(|it| it.strip_prefix("q=").or_else(|| it.strip_prefix("Q=")));
        let weight = weights.next().map_or(Ok(1.0), str::parse);
        let weight = weight
            .ok()
            .filter(|weight| (0.0..=1.0).contains(weight))
            .or(Some(0.0));
        match coding.trim().to_ascii_lowercase().as_str() {
            "gzip" | "x-gzip" => gzip = weight,
            "identity" => identity = weight,
            "*" => any = weight,
            _ => {}
        }
    }
    let gzip: f32 = gzip.or(any).unwrap_or(0.0);
    gzip > 0.0 && gzip >= identity.unwrap_or(0.0)
}

/// `body` as a gzip member. The fastest level is for what is compressed each
/// time, where text full of repeated names still shrinks tenfold; the best for
/// what is compressed once and kept.
pub(crate) fn gzip(body: &[u8], level: Compression) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::with_capacity(body.len() / 8 + 64), level);
    let written = encoder.write_all(body).and_then(|()| encoder.finish());
    // A Vec takes every byte.
    Bytes::from(written.expect("writing to memory does not fail"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(values: &[&str]) -> bool {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(ACCEPT_ENCODING, value.parse().unwrap());
        }
        wants_gzip(&headers)
    }

    #[test]
    fn gzip_is_negotiated_by_weight() {
        for (values, expected) in [
            (&[][..], false),
            (&[""][..], false),
            (&["gzip"][..], true),
            (&["x-gzip"][..], true),
            (&["GZIP"][..], true),
            (&["gzip;q=0"][..], false),
            (&["gzip;q=0.000"][..], false),
            (&["gzip;q=0.001"][..], true),
            (&["gzip ; q=0.5"][..], true),
            (&["gzip;Q=0"][..], false),
            (&["deflate, br"][..], false),
            (&["deflate, gzip;q=1.0, *;q=0.5"][..], true),
            (&["*"][..], true),
            (&["*;q=0"][..], false),
            (&["gzip, *;q=0"][..], true),
            (&["identity"][..], false),
            (&["identity, gzip;q=0.5"][..], false),
            (&["identity;q=0.5, gzip;q=0.5"][..], true),
            (&["identity;q=0, gzip;q=0.1"][..], true),
            (&["deflate", "gzip"][..], true),
            (&["gzip;q=bogus"][..], false),
            (&["gzip;q=1.5"][..], false),
            (&["gzip;q=2"][..], false),
        ] {
            assert_eq!(wants(values), expected, "{values:?}");
        }
    }

    #[test]
    fn gzip_round_trips() {
        use std::io::Read as _;
        let text = "connmon_country_connections{country=\"DE\"} 1\n".repeat(5000);
        let packed = gzip(text.as_bytes(), Compression::fast());
        assert!(packed.len() * 10 < text.len(), "{}", packed.len());
        let mut back = String::new();
        flate2::read::GzDecoder::new(&packed[..])
            .read_to_string(&mut back)
            .unwrap();
        assert_eq!(back, text);
    }
}
