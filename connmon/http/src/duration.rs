//! Durations as Prometheus writes them.

use std::time::Duration;

/// A Prometheus duration: `500ms`, `5s`, `1m30s`, `1h`, `0`. Units `y w d h m
/// s ms`, each at most once, in that order (`model.ParseDuration`).
pub fn duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, u64); 7] = [
        ("y", 365 * 86_400_000),
        ("w", 7 * 86_400_000),
        ("d", 86_400_000),
        ("h", 3_600_000),
        ("m", 60_000),
        ("s", 1_000),
        ("ms", 1),
    ];
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let bad = || format!("bad duration {text:?}: write it like 500ms, 5s, 1m30s or 1h");
    let mut rest = text;
    let mut units = UNITS.iter();
    let mut total_ms: u64 = 0;
    if rest.is_empty() {
        return Err(bad());
    }
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let count: u64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let letters = rest.len()
            - rest
                .trim_start_matches(|c: char| c.is_ascii_lowercase())
                .len();
        let (_, scale) = units
            .find(|(unit, _)| *unit == &rest[..letters])
            .ok_or_else(bad)?;
        rest = &rest[letters..];
        total_ms = count
            .checked_mul(*scale)
            .and_then(|ms| total_ms.checked_add(ms))
            .ok_or_else(|| format!("bad duration {text:?}: too long"))?;
    }
    Ok(Duration::from_millis(total_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_prometheus_ones() {
        for (text, ms) in [
            ("0", 0),
            ("500ms", 500),
            ("5s", 5_000),
            ("1m30s", 90_000),
            ("1h", 3_600_000),
            ("1d2h3m4s5ms", 93_784_005),
            ("2w", 1_209_600_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in [
            "",
            "5",
            "s",
            "1.5s",
            "-1s",
            "5 s",
            "1s1m",
            "5s5s",
            "1µs",
            "5S",
            "99999999999y",
            "1hm",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn durations_are_read_as_written(h in 0_u64..100, m in 0_u64..1000, ms in 0_u64..10_000) {
            let text = format!("{h}h{m}m{ms}ms");
            let expected = h * 3_600_000 + m * 60_000 + ms;
            proptest::prop_assert_eq!(duration(&text), Ok(Duration::from_millis(expected)));
        }

        #[test]
        fn the_parser_is_total(any in ".*", near in "[0-9ywdhms]{0,24}") {
            let _ = (duration(&any), duration(&near));
        }
    }
}
