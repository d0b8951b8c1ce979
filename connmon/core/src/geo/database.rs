//! One country database: checked, then only read.

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

/// Label `source` of `connmon_geoip_database_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseSource {
    /// Part of this binary.
    Embedded,
    /// `--geoip.database`.
    File,
}

impl DatabaseSource {
    /// Label value.
    pub fn label(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::File => "file",
        }
    }
}

/// An open country database. Its bytes are in memory, never mapped, so that
/// nobody who truncates the file can end the process with SIGBUS.
pub struct Database {
    reader: Reader<Cow<'static, [u8]>>,
    source: DatabaseSource,
    database_type: String,
    /// Size of the file.
    bytes: usize,
}

impl Database {
    /// The database that is part of this binary. It is checked by a test, not
    /// at every start.
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
            ..Self::new(reader, DatabaseSource::Embedded, EMBEDDED.len())
        })
    }

    /// Checks and opens the bytes of a file. The check asks `may_go_on` every
    /// 1,024 networks, so that the caller bounds its time; each single step is
    /// bounded by the maxminddb crate.
    ///
    /// # Errors
    /// What is wrong with the bytes, or that the check was ended.
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
        let database = Self::new(reader, DatabaseSource::File, length);
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

    fn new(reader: Reader<Cow<'static, [u8]>>, source: DatabaseSource, bytes: usize) -> Self {
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

    /// Where it came from.
    pub fn source(&self) -> DatabaseSource {
        self.source
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

    /// What the report says of it.
    pub fn info(&self, reloads_ok: u64, reloads_failed: u64) -> DatabaseInfo {
        DatabaseInfo {
            database_type: self.database_type.clone(),
            source: self.source.label(),
            build_timestamp: self.build_timestamp(),
            reloads_ok,
            reloads_failed,
        }
    }

    /// The record of an address: its offset in the data section, which tells
    /// records apart, and a way to read it. `None` when the database has none.
    pub(super) fn record(&self, address: IpAddr) -> Option<(usize, Record<'_>)> {
        if address.is_ipv6() && self.reader.metadata().ip_version == 4 {
            return None;
        }
        let result = self.reader.lookup(address).ok()?;
        Some((result.offset()?, Record(result)))
    }

    /// Prefix length of the network whose record covers an address.
    pub(super) fn prefix(&self, address: IpAddr) -> Option<u8> {
        if address.is_ipv6() && self.reader.metadata().ip_version == 4 {
            return None;
        }
        let result = self.reader.lookup(address).ok()?;
        result.offset()?;
        let network = result.network().ok()?;
        // A record above the IPv4 part of the tree spans all of it.
        (network.is_ipv4() == address.is_ipv4()).then(|| network.prefix())
    }

    /// Walks the whole search tree and decodes every distinct record once;
    /// true when at least one of them names a country. The crate's own
    /// `verify` is not used: it refuses files without a description, DB-IP's
    /// among them.
    fn check(&self, mut may_go_on: impl FnMut() -> bool) -> Result<bool, String> {
        let options = WithinOptions::default().include_networks_without_data();
        let networks = self.reader.networks(options).map_err(text)?;
        // A tree of n nodes has n + 1 leaves, a few times that with aliases
        // of its IPv4 part; a cycle yields more, or ends in an error itself.
        let most = self.reader.metadata().node_count as usize * 3 + 3;
        let mut checked = Offsets::below(self.bytes);
        let mut names_country = false;
        for (index, network) in networks.enumerate() {
            let network = network.map_err(text)?;
            if index > most {
                return Err(format!("the search tree yields more than {most} networks"));
            }
            if index % 1_024 == 0 && !may_go_on() {
                return Err("the check takes too long".to_owned());
            }
            if network
                .offset()
                .is_some_and(|offset| checked.insert(offset))
            {
                network.decode::<serde::de::IgnoredAny>().map_err(text)?;
                names_country = names_country || Record(network).names_country();
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

/// A set of offsets, one bit for each: a file can name as many records as it
/// has bytes, and a hash set of them all would be many times its size.
struct Offsets(Vec<u64>);

impl Offsets {
    fn below(end: usize) -> Self {
        Self(vec![0; end.div_ceil(64)])
    }

    /// Whether it was not among them yet.
    fn insert(&mut self, offset: usize) -> bool {
        let (word, bit) = (offset / 64, 1 << (offset % 64));
        let new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        new
    }
}

/// One record, not yet decoded.
pub(super) struct Record<'a>(LookupResult<'a, Cow<'static, [u8]>>);

impl Record<'_> {
    /// Flat `country_code` (DB-IP, IPinfo), nested `country.iso_code`
    /// (MaxMind), or flat `country` where that is a code (IPinfo). What the
    /// operator registered (`registered_country`) is not where the host is.
    pub(super) fn country(&self) -> Country {
        self.code().map_or(Country::UNKNOWN, Country::from_code)
    }

    /// Whether it has one of those fields, whatever its value.
    fn names_country(&self) -> bool {
        self.code().is_some_and(|code| code.len() == 2)
    }

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

/// Why bytes are no country database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidDatabase(String);

impl fmt::Display for InvalidDatabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for InvalidDatabase {}

fn text(error: impl fmt::Display) -> String {
    error.to_string()
}
