//! A country database, checked when it is opened.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use maxminddb::{LookupResult, PathElement, Reader, WithinOptions};

use super::Country;
use crate::report::DatabaseInfo;
use crate::text::printable;

/// DB-IP Lite country, CC BY 4.0; see `data/NOTICE`.
static EMBEDDED: &[u8] = include_bytes!("../../../data/dbip-country-lite.mmdb");

/// Label `database_type` of the embedded database.
const EMBEDDED_TYPE: &str = "DBIP-Country-Lite";

/// Longest `database_type` kept, characters.
const MAX_TYPE_CHARS: usize = 64;

/// An open country database. Its bytes are in memory and not mapped: a file
/// that is truncated while mapped ends the process with SIGBUS.
pub struct Database {
    reader: Reader<Cow<'static, [u8]>>,
    /// Label `source` of `connmon_geoip_database_info`.
    source: &'static str,
    database_type: String,
    /// Size of the file.
    bytes: usize,
}

impl Database {
    /// The database in this binary. A test checks it, not every start.
    ///
    /// # Errors
    /// When the binary is damaged.
    pub fn embedded() -> Result<Self, InvalidDatabase> {
        let reader = Reader::from_source(Cow::Borrowed(EMBEDDED)).map_err(|error| {
            InvalidDatabase(format!("the embedded country database is damaged: {error}"))
        })?;
        Ok(Self {
            // The file's own type, "country ipvAll", names neither vendor nor
            // product.
            database_type: EMBEDDED_TYPE.to_owned(),
            ..Self::new(reader, "embedded", EMBEDDED.len())
        })
    }

    /// Checks and opens the bytes of a file. Every 1,024 networks the check asks
    /// `may_go_on`, by which the caller limits its time; the maxminddb crate
    /// limits each step.
    ///
    /// # Errors
    /// The fault in the bytes, or that the check was ended.
    pub fn from_bytes(
        bytes: Vec<u8>,
        may_go_on: impl FnMut() -> bool,
    ) -> Result<Self, InvalidDatabase> {
        if bytes.is_empty() {
            return Err(InvalidDatabase("the file is empty".to_owned()));
        }
        let length = bytes.len();
        let reader = Reader::from_source(Cow::Owned(bytes))
            .map_err(|error| InvalidDatabase(format!("no valid MMDB file: {error}")))?;
        let database = Self::new(reader, "file", length);
        let names_country = database
            .check(may_go_on)
            .map_err(|problem| InvalidDatabase(format!("damaged MMDB file: {problem}")))?;
        if !names_country {
            return Err(InvalidDatabase(format!(
                "database type {:?} names no country (neither country.iso_code nor country_code); use a country or city database",
                database.database_type
            )));
        }
        Ok(database)
    }

    fn new(reader: Reader<Cow<'static, [u8]>>, source: &'static str, bytes: usize) -> Self {
        let database_type = &reader.metadata().database_type;
        let start: String = database_type.chars().take(MAX_TYPE_CHARS).collect();
        let database_type = printable(start);
        Self {
            reader,
            source,
            database_type,
            bytes,
        }
    }

    /// `database_type` of its metadata, control characters replaced, at most
    /// 64 characters.
    pub fn database_type(&self) -> &str {
        &self.database_type
    }

    /// When it was built, Unix seconds.
    pub fn build_timestamp(&self) -> u64 {
        self.reader.metadata().build_epoch
    }

    /// Its part of the report.
    pub fn info(&self, reloads_ok: u64, reloads_failed: u64) -> DatabaseInfo {
        DatabaseInfo {
            database_type: self.database_type.clone(),
            source: self.source,
            build_timestamp: self.build_timestamp(),
            reloads_ok,
            reloads_failed,
        }
    }

    fn find(&self, address: IpAddr) -> Option<LookupResult<'_, Cow<'static, [u8]>>> {
        if address.is_ipv6() && self.reader.metadata().ip_version == 4 {
            return None;
        }
        self.reader.lookup(address).ok()
    }

    /// The record of an address, and its offset in the data section, which
    /// identifies it. `None` when the database has none.
    pub(super) fn record(&self, address: IpAddr) -> Option<(usize, Record<'_>)> {
        let result = self.find(address)?;
        Some((result.offset()?, Record(result)))
    }

    /// Prefix length of the network whose record covers an address.
    pub(super) fn prefix(&self, address: IpAddr) -> Option<u8> {
        let result = self.find(address)?;
        result.offset()?;
        let network = result.network().ok()?;
        // A record above the IPv4 part of the tree spans all of it.
        (network.is_ipv4() == address.is_ipv4()).then(|| network.prefix())
    }

    /// Reads the whole search tree and decodes each distinct record once; true
    /// when one of them names a country. `Reader::verify` is not used: it
    /// refuses files without a description, such as DB-IP's.
    fn check(&self, mut may_go_on: impl FnMut() -> bool) -> Result<bool, String> {
        let text = |error: maxminddb::MaxMindDbError| error.to_string();
        let options = WithinOptions::default().include_networks_without_data();
        let networks = self.reader.networks(options).map_err(text)?;
        // A tree of n nodes has n + 1 leaves, a few times that with aliases
        // of its IPv4 part; a cycle yields more, or ends in an error itself.
        let most = self.reader.metadata().node_count as usize * 3 + 3;
        // One bit for each offset: a hash set would be many times the file.
        let mut checked = vec![0u64; self.bytes.div_ceil(64)];
        let mut names_country = false;
        for (index, network) in networks.enumerate() {
            let network = network.map_err(text)?;
            if index > most {
                return Err(format!("the search tree yields more than {most} networks"));
            }
            if index % 1_024 == 0 && !may_go_on() {
                return Err("the check takes too long".to_owned());
            }
            let Some(offset) = network.offset() else {
                continue;
            };
            let (word, bit) = (&mut checked[offset / 64], 1 << (offset % 64));
            if *word & bit == 0 {
                *word |= bit;
                network.decode::<serde::de::IgnoredAny>().map_err(text)?;
                names_country |= Record(network).code().is_some_and(|code| code.len() == 2);
            }
        }
        Ok(names_country)
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database")
            .field("source", &self.source)
            .field("database_type", &self.database_type)
            .finish_non_exhaustive()
    }
}

/// One record, not yet decoded.
pub(super) struct Record<'a>(LookupResult<'a, Cow<'static, [u8]>>);

impl Record<'_> {
    pub(super) fn country(&self) -> Country {
        self.code().map_or(Country::UNKNOWN, Country::from_code)
    }

    /// Flat `country_code` (DB-IP, IPinfo), nested `country.iso_code`
    /// (MaxMind), or flat `country` if that is a code (IPinfo). Not
    /// `registered_country`: that is the operator's, not the host's.
    fn code(&self) -> Option<&str> {
        const PATHS: [&[PathElement<'static>]; 3] = [
            &[PathElement::Key("country_code")],
            &[PathElement::Key("country"), PathElement::Key("iso_code")],
            &[PathElement::Key("country")],
        ];
        PATHS
            .iter()
            .find_map(|path| self.0.decode_path::<&str>(path).ok().flatten())
    }
}

/// Why some bytes are not a country database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidDatabase(String);

impl fmt::Display for InvalidDatabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for InvalidDatabase {}
