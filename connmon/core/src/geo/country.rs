//! The values of the label `country`.

/// A `country` label value: an ISO 3166-1 alpha-2 code (or `XK`), `private`,
/// `loopback` or `unknown`; in one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Country(u8);

/// ISO 3166-1 alpha-2, officially assigned codes, and `XK` (Kosovo), sorted.
const CODES: &[u8; 500] = b"\
ADAEAFAGAIALAMAOAQARASATAUAWAXAZBABBBDBEBFBGBHBIBJBLBMBNBOBQBRBSBTBVBWBYBZ\
CACCCDCFCGCHCICKCLCMCNCOCRCUCVCWCXCYCZDEDJDKDMDODZECEEEGEHERESETFIFJFKFMFOFR\
GAGBGDGEGFGGGHGIGLGMGNGPGQGRGSGTGUGWGYHKHMHNHRHTHUIDIEILIMINIOIQIRISITJEJMJOJP\
KEKGKHKIKMKNKPKRKWKYKZLALBLCLILKLRLSLTLULVLYMAMCMDMEMFMGMHMKMLMMMNMOMPMQMRMSMTMU\
MVMWMXMYMZNANCNENFNGNINLNONPNRNUNZOMPAPEPFPGPHPKPLPMPNPRPSPTPWPYQARERORSRURW\
SASBSCSDSESGSHSISJSKSLSMSNSOSRSSSTSVSXSYSZTCTDTFTGTHTJTKTLTMTNTOTRTTTVTWTZ\
UAUGUMUSUYUZVAVCVEVGVIVNVUWFWSXKYEYTZAZMZW";

impl Country {
    /// How many distinct values there are; every value's index is below it.
    pub const COUNT: usize = CODES.len() / 2 + 3;
    /// RFC 1918, ULA, link-local and CGNAT addresses.
    pub const PRIVATE: Self = Self((Self::COUNT - 3) as u8);
    /// 127.0.0.0/8, ::1, or local address = remote address.
    pub const LOOPBACK: Self = Self((Self::COUNT - 2) as u8);
    /// Anything a database does not place in a country.
    pub const UNKNOWN: Self = Self((Self::COUNT - 1) as u8);

    /// The country of an alpha-2 code in either case; everything else,
    /// `ZZ`, `EU` and `AP` included, is [`Country::UNKNOWN`].
    pub fn from_code(code: &str) -> Self {
        let &[first, second] = code.as_bytes() else {
            return Self::UNKNOWN;
        };
        let wanted = [first.to_ascii_uppercase(), second.to_ascii_uppercase()];
        let (pairs, _) = CODES.as_chunks::<2>();
        match pairs.binary_search(&wanted) {
            Ok(index) => Self(index as u8),
            Err(_) => Self::UNKNOWN,
        }
    }

    /// The label value.
    pub fn code(self) -> &'static str {
        match self {
            Self::PRIVATE => "private",
            Self::LOOPBACK => "loopback",
            Self::UNKNOWN => "unknown",
            Self(index) => {
                let at = usize::from(index) * 2;
                std::str::from_utf8(&CODES[at..at + 2]).unwrap_or("unknown")
            }
        }
    }

    /// Whether this is a real country, not one of the three special values.
    pub fn is_public(self) -> bool {
        self < Self::PRIVATE
    }

    /// This value's place in a table of [`Country::COUNT`] rows.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// The value at `index`, if there is one.
    pub fn from_index(index: usize) -> Option<Self> {
        (index < Self::COUNT).then_some(Self(index as u8))
    }
}

const _: () = assert!(Country::COUNT <= 256);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_finds_itself() {
        for index in 0..Country::COUNT - 3 {
            let country = Country::from_index(index).unwrap();
            assert_eq!(Country::from_code(country.code()), country);
            assert_eq!(Country::from_code(&country.code().to_lowercase()), country);
        }
    }

    #[test]
    fn what_is_no_country_is_unknown() {
        for code in ["ZZ", "EU", "AP", "", "U", "USA", "<script>", "é"] {
            assert_eq!(Country::from_code(code), Country::UNKNOWN, "{code}");
        }
        assert_eq!(Country::from_code("XK").code(), "XK");
    }
}
