//! Which content coding a client wants, and gzip.

use std::io::Write as _;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use hyper::header::{ACCEPT_ENCODING, HeaderMap};

/// Bodies shorter than this (bytes) are sent as they are: gzip would not make
/// them fit fewer packets.
pub(crate) const WORTH_COMPRESSING: usize = 512;

/// Whether the client would rather have gzip than the plain body (RFC 9110,
/// 12.5.3): it names gzip (or `*`) with a weight above zero and not below
/// the one it gives `identity`.
pub(crate) fn wants_gzip(headers: &HeaderMap) -> bool {
    let (mut gzip, mut identity, mut any) = (None, None, None);
    for value in headers.get_all(ACCEPT_ENCODING) {
        let Ok(value) = value.to_str() else { continue };
        for item in value.split(',') {
            let (coding, weight) = parse_item(item);
            if coding.eq_ignore_ascii_case("gzip") || coding.eq_ignore_ascii_case("x-gzip") {
                gzip = Some(weight);
            } else if coding.eq_ignore_ascii_case("identity") {
                identity = Some(weight);
            } else if coding == "*" {
                any = Some(weight);
            }
        }
    }
    let gzip = gzip.or(any).unwrap_or(0);
    gzip > 0 && gzip >= identity.unwrap_or(0)
}

/// `coding;q=0.5` → coding and weight in thousandths. A weight that is not a
/// qvalue counts as 0: what cannot be read is not an offer.
fn parse_item(item: &str) -> (&str, u16) {
    let mut parts = item.split(';');
    let coding = parts.next().unwrap_or("").trim();
    let mut weight = 1000;
    for parameter in parts {
        let parameter = parameter.trim();
        if let Some(value) = parameter
            .strip_prefix("q=")
            .or_else(|| parameter.strip_prefix("Q="))
        {
            weight = parse_qvalue(value).unwrap_or(0);
        }
    }
    (coding, weight)
}

/// `0`, `0.xxx`, `1` or `1.000` in thousandths.
fn parse_qvalue(value: &str) -> Option<u16> {
    let (whole, fraction) = value.split_once('.').unwrap_or((value, ""));
    let whole: u16 = match whole {
        "0" => 0,
        "1" => 1000,
        _ => return None,
    };
    if fraction.len() > 3 || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let mut thousandths = 0;
    for place in 0..3 {
        let digit = fraction.as_bytes().get(place).map_or(0, |byte| byte - b'0');
        thousandths = thousandths * 10 + u16::from(digit);
    }
    Some((whole + thousandths).min(1000))
}

/// `body` as a gzip member, at the fastest level: a scrape is compressed
/// afresh each time, and text full of repeated names shrinks tenfold even so.
pub(crate) fn gzip(body: &[u8]) -> Bytes {
    gzip_at(Compression::fast(), body)
}

/// `body` as a gzip member, as small as it gets: for what is compressed once
/// and kept.
pub(crate) fn gzip_small(body: &[u8]) -> Bytes {
    gzip_at(Compression::best(), body)
}

fn gzip_at(level: Compression, body: &[u8]) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::with_capacity(body.len() / 8 + 64), level);
    let written = encoder.write_all(body).and_then(|()| encoder.finish());
    // A Vec takes every byte, so the only error there could be is a bug.
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
            (&["gzip;q=1.5"][..], true),
            (&["gzip;q=2"][..], false),
        ] {
            assert_eq!(wants(values), expected, "{values:?}");
        }
    }

    #[test]
    fn gzip_round_trips() {
        use std::io::Read as _;
        let text = "connmon_country_connections{country=\"DE\"} 1\n".repeat(5000);
        let packed = gzip(text.as_bytes());
        assert!(packed.len() * 10 < text.len(), "{}", packed.len());
        let mut back = String::new();
        flate2::read::GzDecoder::new(&packed[..])
            .read_to_string(&mut back)
            .unwrap();
        assert_eq!(back, text);
    }
}
