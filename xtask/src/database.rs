//! The embedded country database, made small: equal parts of its search tree
//! are stored once. Every lookup and every prefix stays what it was, since a
//! reader of the format (MaxMind DB 2.0) only follows the records of nodes.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use mmdb_writer::{Value, Writer};

const METADATA: &[u8] = b"\xab\xcd\xefMaxMind.com";
/// Two records of 24 bits.
const NODE: usize = 6;

/// `cargo xtask shrink-database`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The database; it is replaced
    #[arg(default_value = "connmon/data/dbip-country-lite.mmdb")]
    database: PathBuf,
}

/// Rewrites the file, after a comparison of both trees.
///
/// # Errors
/// When it is no database that this understands, or cannot be written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let path = args.database.display();
    let before = fs::read(&args.database).with_context(|| format!("cannot read {path}"))?;
    let after = shrink(&before).with_context(|| format!("{path}"))?;
    println!("{path}: {} bytes, now {}", before.len(), after.len());
    let beside = args.database.with_extension("mmdb.new");
    fs::write(&beside, after).with_context(|| format!("cannot write {}", beside.display()))?;
    fs::rename(&beside, &args.database).with_context(|| format!("cannot replace {path}"))?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a database of made-up countries: network and code of each.
///
/// # Errors
/// When a network is none, or the file cannot be written.
pub fn make_up(
    path: &Path,
    networks: impl IntoIterator<Item = (String, impl AsRef<str>)>,
) -> Result<()> {
    let mut writer = Writer::new("connmon: made-up countries");
    for (network, code) in networks {
        let network: ipnet::IpNet = network.parse()?;
        let record = Value::map([("country_code", Value::from(code.as_ref()))]);
        writer
            .insert_value(network, record)
            .with_context(|| format!("database entry {network}"))?;
    }
    let bytes = writer.to_bytes().context("cannot build the database")?;
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// A search tree with what follows it.
struct Tree<'a> {
    nodes: &'a [[u8; NODE]],
    /// From the separator on.
    rest: &'a [u8],
    /// Where in `rest` the number of nodes stands.
    count: std::ops::Range<usize>,
}

/// Where a record leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Record {
    Node(u32),
    /// Nothing is known (0), or the place in the data, counted from the end
    /// of the tree.
    Leaf(u32),
}

impl<'a> Tree<'a> {
    fn parse(file: &'a [u8]) -> Result<Self> {
        let start = file
            .windows(METADATA.len())
            .rposition(|window| window == METADATA)
            .context("no metadata: not a MaxMind DB")?;
        ensure!(
            number(file, start, "record_size")?.0 == 24,
            "records of other than 24 bits are not handled"
        );
        let (count, place) = number(file, start, "node_count")?;
        let length = count as usize * NODE;
        let (nodes, rest) = file
            .split_at_checked(length)
            .context("the file ends within its tree")?;
        ensure!(
            rest.starts_with(&[0; 16]),
            "the tree does not end at a separator"
        );
        Ok(Self {
            nodes: nodes.as_chunks().0,
            rest,
            count: place.start - length..place.end - length,
        })
    }

    fn records(&self, node: u32) -> Result<[Record; 2]> {
        let [a, b, c, d, e, f] =
            *(self.nodes.get(node as usize)).with_context(|| format!("no node {node}"))?;
        let count = self.nodes.len() as u32;
        Ok([[a, b, c], [d, e, f]].map(|[a, b, c]| {
            let value = u32::from_be_bytes([0, a, b, c]);
            match value.checked_sub(count) {
                None => Record::Node(value),
                Some(leaf) => Record::Leaf(leaf),
            }
        }))
    }
}

/// An unsigned number of the metadata, and where its bytes stand.
fn number(file: &[u8], metadata: usize, key: &str) -> Result<(u32, std::ops::Range<usize>)> {
    let found = file[metadata..]
        .windows(key.len())
        .position(|window| window == key.as_bytes())
        .with_context(|| format!("the metadata has no {key}"))?;
    let control = metadata + found + key.len();
    // Types 5 and 6: uint16 and uint32; the length is in the same byte.
    let byte = *file.get(control).context("the metadata ends early")?;
    let length = usize::from(byte & 0b1_1111);
    ensure!(
        matches!(byte >> 5, 5 | 6) && length <= 4,
        "{key} is no unsigned number"
    );
    let place = control + 1..control + 1 + length;
    let bytes = file.get(place.clone()).context("the metadata ends early")?;
    let value = bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u32::from(*byte));
    Ok((value, place))
}

/// The same database with every distinct node once.
fn shrink(file: &[u8]) -> Result<Vec<u8>> {
    let tree = Tree::parse(file)?;
    let (nodes, root) = distinct(&tree)?;
    // The root is node 0 for a reader; children follow their parents, so that
    // a lookup moves forward.
    let mut order = Vec::with_capacity(nodes.len());
    let mut places = HashMap::new();
    let mut pending = vec![root];
    while let Some(node) = pending.pop() {
        if places.contains_key(&node) {
            continue;
        }
        places.insert(node, order.len() as u32);
        order.push(node);
        for record in nodes[node as usize].iter().rev() {
            if let Record::Node(child) = record {
                pending.push(*child);
            }
        }
    }
    let count = order.len() as u32;
    let mut out = Vec::with_capacity(order.len() * NODE + tree.rest.len());
    for node in order {
        for record in nodes[node as usize] {
            let value = match record {
                Record::Node(child) => places[&child],
                Record::Leaf(leaf) => count + leaf,
            };
            ensure!(value < 1 << 24, "a record needs more than 24 bits");
            out.extend(&value.to_be_bytes()[1..]);
        }
    }
    let at = out.len() + tree.count.start;
    out.extend(tree.rest);
    let bytes = count.to_be_bytes();
    let length = tree.count.len();
    out[at..at + length].copy_from_slice(&bytes[4 - length..]);
    ensure!(
        same(&tree, &Tree::parse(&out)?)?,
        "the trees differ; this is a fault of shrink-database"
    );
    Ok(out)
}

/// Distinct nodes, children by index among them, and which one is the root.
fn distinct(tree: &Tree<'_>) -> Result<(Vec<[Record; 2]>, u32)> {
    let mut nodes = Vec::new();
    let mut known = HashMap::new();
    let mut renamed: HashMap<u32, u32> = HashMap::new();
    let mut pending = vec![(0, false)];
    while let Some((node, children_done)) = pending.pop() {
        if renamed.contains_key(&node) {
            continue;
        }
        let records = tree.records(node)?;
        if !children_done {
            ensure!(
                pending.len() <= 3 * (128 + 1),
                "the tree is deeper than an address is long"
            );
            pending.push((node, true));
            for record in records {
                if let Record::Node(child) = record {
                    pending.push((child, false));
                }
            }
            continue;
        }
        let records = records.map(|record| match record {
            Record::Node(child) => Record::Node(renamed[&child]),
            leaf => leaf,
        });
        let name = *known.entry(records).or_insert_with(|| {
            nodes.push(records);
            nodes.len() as u32 - 1
        });
        renamed.insert(node, name);
    }
    let root = renamed[&0];
    Ok((nodes, root))
}

/// Whether every address and prefix leads to the same place in the data.
fn same(a: &Tree<'_>, b: &Tree<'_>) -> Result<bool> {
    if a.rest[..a.count.start] != b.rest[..b.count.start] {
        return Ok(false);
    }
    let mut compared = HashSet::new();
    let mut pending = vec![(0, 0)];
    while let Some(pair) = pending.pop() {
        if !compared.insert(pair) {
            continue;
        }
        for records in std::iter::zip(a.records(pair.0)?, b.records(pair.1)?) {
            match records {
                (Record::Node(a), Record::Node(b)) => pending.push((a, b)),
                (Record::Leaf(a), Record::Leaf(b)) if a == b => {}
                _ => return Ok(false),
            }
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use maxminddb::{Reader, WithinOptions};

    /// Networks of one pattern, IPv4 and IPv6.
    fn database(name: &str) -> Vec<u8> {
        let networks = (0..16).flat_map(|at| {
            [
                (format!("20.{at}.0.0/17"), "DE"),
                (format!("20.{at}.128.0/20"), "FR"),
                (format!("2600:{at}00::/32"), "US"),
                (format!("2600:{at}80::/48"), "DE"),
            ]
        });
        let path = std::env::temp_dir().join(format!("connmon-{name}-{}", std::process::id()));
        make_up(&path, networks).unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        bytes
    }

    fn networks(file: &[u8]) -> Vec<(String, Option<String>)> {
        let reader = Reader::from_source(file).unwrap();
        reader
            .within("::/0".parse().unwrap(), WithinOptions::default())
            .unwrap()
            .map(|found| {
                let found = found.unwrap();
                let code = found
                    .decode_path(&[maxminddb::PathElement::Key("country_code")])
                    .unwrap();
                (found.network().unwrap().to_string(), code)
            })
            .collect()
    }

    #[test]
    fn a_shrunk_database_has_the_same_networks() {
        let file = database("shrink");
        let shrunk = shrink(&file).unwrap();
        assert!(shrunk.len() < file.len(), "{} {}", file.len(), shrunk.len());
        assert_eq!(networks(&shrunk), networks(&file));
        assert!(networks(&file).len() >= 64);
        assert_eq!(shrink(&shrunk).unwrap(), shrunk, "once is enough");
    }

    #[test]
    fn trees_that_differ_are_found_different() {
        let file = database("differ");
        let tree = Tree::parse(&file).unwrap();
        assert!(same(&tree, &tree).unwrap());
        let leaf = (0..2 * tree.nodes.len())
            .find(|at| {
                let records = tree.records((at / 2) as u32).unwrap();
                matches!(records[at % 2], Record::Leaf(16..))
            })
            .unwrap();
        let mut other = file.clone();
        // The last byte of that record: another place in the data.
        other[leaf * NODE / 2 + 2] ^= 1;
        assert!(!same(&tree, &Tree::parse(&other).unwrap()).unwrap());
    }

    #[test]
    fn a_file_that_is_no_database_is_refused() {
        for file in [
            &b""[..],
            METADATA,
            b"\xab\xcd\xefMaxMind.com\x4brecord_size",
        ] {
            assert!(shrink(file).is_err());
        }
        let file = database("refused");
        assert!(shrink(&file[NODE..]).is_err());
    }
}
