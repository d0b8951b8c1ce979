//! The kernel's own type information (`/sys/kernel/btf/vmlinux`): where a
//! member lies in a structure, and the ids of the functions and tracepoints
//! that programs attach to.
//!
//! Reads the format of `include/uapi/linux/btf.h` with safe, bounds-checked
//! code: a malformed blob is an error, never a panic.

use std::fmt;

/// Where the kernel shows its BTF.
pub const SYS_PATH: &str = "/sys/kernel/btf/vmlinux";

/// `BTF_MAGIC`, the first two bytes.
pub const MAGIC: u16 = 0xeb9f;

/// `BTF_KIND_STRUCT`.
pub const KIND_STRUCT: u32 = 4;
/// `BTF_KIND_TYPEDEF`.
pub const KIND_TYPEDEF: u32 = 8;
/// `BTF_KIND_FUNC`.
pub const KIND_FUNC: u32 = 12;

const KIND_UNION: u32 = 5;

/// Deepest nesting of anonymous members and modifiers that is followed; the
/// kernel's own is below 10.
const MAX_DEPTH: u32 = 32;
/// Most members looked at for one path; the kernel's largest structures have
/// a few hundred.
const MAX_STEPS: u32 = 100_000;

/// What is wrong with a blob, or what it lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BtfError {
    /// Not BTF, or cut short.
    Malformed(&'static str),
    /// A kind of type newer than this program.
    UnknownKind(u32),
    /// No such structure or member.
    NoMember {
        /// Structure.
        container: String,
        /// Member path.
        path: String,
    },
    /// A member is not where the programs were built to find it.
    Moved {
        /// Structure and member.
        path: String,
        /// Where it is, bytes.
        offset: u32,
        /// Where it should be, bytes.
        expected: u32,
    },
}

impl fmt::Display for BtfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(what) => write!(f, "malformed BTF: {what}"),
            Self::UnknownKind(kind) => write!(f, "BTF has a type of unknown kind {kind}"),
            Self::NoMember { container, path } => {
                write!(f, "BTF has no member {path} of struct {container}")
            }
            Self::Moved {
                path,
                offset,
                expected,
            } => write!(f, "{path} is at offset {offset}, not {expected}"),
        }
    }
}

impl std::error::Error for BtfError {}

/// A parsed view of a blob.
#[derive(Debug)]
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type begins in `types`; index 0 is type 1.
    index: Vec<u32>,
    /// Ids of the wanted types, by their place in the list.
    found: Vec<(Wanted, u32)>,
}

/// Kind and name of a type that will be asked for.
pub type Wanted = (u32, &'static str);

/// `struct btf_type`, unpacked.
#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    vlen: usize,
    kind_flag: bool,
    /// `size` or `type`.
    value: u32,
    /// Offset in `types` of what follows.
    rest: usize,
}

impl<'a> Btf<'a> {
    /// Indexes a blob in the host's byte order. One pass: only `wanted` types
    /// can be asked for by name afterwards.
    pub fn parse(blob: &'a [u8], wanted: &[Wanted]) -> Result<Self, BtfError> {
        const CUT: BtfError = BtfError::Malformed("cut short");
        let word = |at| u32_at(blob, at).ok_or(CUT);
        let magic = blob.get(..2).ok_or(CUT)?;
        if magic != MAGIC.to_ne_bytes() {
            return Err(BtfError::Malformed("wrong magic"));
        }
        let header = word(4)? as usize;
        let section = |offset: u32, len: u32| {
            let from = header.checked_add(offset as usize)?;
            blob.get(from..from.checked_add(len as usize)?)
        };
        let types = section(word(8)?, word(12)?).ok_or(CUT)?;
        let strings = section(word(16)?, word(20)?).ok_or(CUT)?;

        let mut btf = Self {
            types,
            strings,
            // About 25 bytes a type, over all kinds.
            index: Vec::with_capacity(types.len() / 20),
            found: Vec::new(),
        };
        let mut at = 0;
        while at < types.len() {
            let this = btf.read(at)?;
            btf.index.push(at as u32);
            let id = btf.index.len() as u32;
            for want in wanted {
                if want.0 == this.kind && btf.is_named(this.name, want.1) {
                    btf.found.push((*want, id));
                }
            }
            at = this.rest + rest_len(this.kind, this.vlen)?;
        }
        if at != types.len() {
            return Err(CUT);
        }
        Ok(btf)
    }

    /// Id of the first wanted type of this kind and name.
    pub fn id(&self, kind: u32, name: &str) -> Option<u32> {
        self.ids(kind, name).next()
    }

    /// Offset in bytes of a member of `struct container`, one of the wanted
    /// types; `path` has dots between nested structures, anonymous ones are
    /// looked through.
    pub fn offset(&self, container: &str, path: &str) -> Result<u32, BtfError> {
        match self.bit_offset(container, path) {
            // A bit field has no address.
            Ok(bits) if bits % 8 != 0 => Err(no_member(container, path)),
            bits => bits.map(|bits| bits / 8),
        }
    }

    /// As [`Btf::offset`], in bits, for a member that may be a bit field. The
    /// lowest bit of a byte comes first, as on every little-endian machine.
    pub fn bit_offset(&self, container: &str, path: &str) -> Result<u32, BtfError> {
        self.ids(KIND_STRUCT, container)
            .filter_map(|id| self.get(id))
            .find_map(|this| self.walk(this, path))
            .ok_or_else(|| no_member(container, path))
    }

    fn ids(&self, kind: u32, name: &str) -> impl Iterator<Item = u32> {
        self.found
            .iter()
            .filter(move |(want, _)| *want == (kind, name))
            .map(|(_, id)| *id)
    }

    fn walk(&self, container: Type, path: &str) -> Option<u32> {
        let mut current = container;
        let mut offset = 0u32;
        let mut steps = MAX_STEPS;
        let mut names = path.split('.').peekable();
        while let Some(name) = names.next() {
            if name.is_empty() {
                return None;
            }
            let (bits, type_id) = self.member(current, name.as_bytes(), 0, &mut steps)?;
            offset = offset.checked_add(bits)?;
            if names.peek().is_some() {
                current = self.composite(type_id)?;
            }
        }
        Some(offset)
    }

    /// Bit offset and type of a member, through anonymous members.
    fn member(
        &self,
        container: Type,
        wanted: &[u8],
        depth: u32,
        steps: &mut u32,
    ) -> Option<(u32, u32)> {
        if depth > MAX_DEPTH {
            return None;
        }
        for number in 0..container.vlen {
            *steps = steps.checked_sub(1)?;
            let at = container.rest + number * 12;
            let name = u32_at(self.types, at)?;
            let type_id = u32_at(self.types, at + 4)?;
            let mut bits = u32_at(self.types, at + 8)?;
            if container.kind_flag {
                bits &= 0xff_ffff;
            }
            let name = self.name(name);
            if name == wanted {
                return Some((bits, type_id));
            }
            if name.is_empty()
                && let Some(inner) = self.composite(type_id)
                && let Some((inner_bits, type_id)) = self.member(inner, wanted, depth + 1, steps)
            {
                return Some((bits.checked_add(inner_bits)?, type_id));
            }
        }
        None
    }

    /// The structure or union behind typedefs and qualifiers.
    fn composite(&self, mut id: u32) -> Option<Type> {
        for _ in 0..MAX_DEPTH {
            let this = self.get(id)?;
            match this.kind {
                KIND_STRUCT | KIND_UNION => return Some(this),
                // TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG
                KIND_TYPEDEF | 9..=11 | 18 => id = this.value,
                _ => return None,
            }
        }
        None
    }

    fn get(&self, id: u32) -> Option<Type> {
        let at = *self.index.get((id as usize).checked_sub(1)?)?;
        self.read(at as usize).ok()
    }

    fn read(&self, at: usize) -> Result<Type, BtfError> {
        let word = |nth: usize| {
            u32_at(self.types, at + nth * 4).ok_or(BtfError::Malformed("type cut short"))
        };
        let info = word(1)?;
        let this = Type {
            name: word(0)?,
            kind: (info >> 24) & 0x1f,
            vlen: (info & 0xffff) as usize,
            kind_flag: info >> 31 == 1,
            value: word(2)?,
            rest: at + 12,
        };
        if this.rest + rest_len(this.kind, this.vlen)? > self.types.len() {
            return Err(BtfError::Malformed("type cut short"));
        }
        Ok(this)
    }

    fn is_named(&self, offset: u32, name: &str) -> bool {
        self.strings
            .get(offset as usize..)
            .and_then(|tail| tail.strip_prefix(name.as_bytes()))
            .is_some_and(|tail| tail.first() == Some(&0))
    }

    fn name(&self, offset: u32) -> &'a [u8] {
        let tail = self.strings.get(offset as usize..).unwrap_or_default();
        let end = tail.iter().position(|byte| *byte == 0);
        &tail[..end.unwrap_or(tail.len())]
    }
}

fn no_member(container: &str, path: &str) -> BtfError {
    BtfError::NoMember {
        container: container.to_owned(),
        path: path.to_owned(),
    }
}

/// Bytes after the common part of a type.
fn rest_len(kind: u32, vlen: usize) -> Result<usize, BtfError> {
    Ok(match kind {
        // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
        2 | 7..=12 | 16 | 18 => 0,
        // INT, VAR, DECL_TAG
        1 | 14 | 17 => 4,
        // ARRAY
        3 => 12,
        // STRUCT, UNION, DATASEC, ENUM64
        4 | 5 | 15 | 19 => vlen * 12,
        // ENUM, FUNC_PROTO
        6 | 13 => vlen * 8,
        _ => return Err(BtfError::UnknownKind(kind)),
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(word.try_into().ok()?))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Builds blobs.
    #[derive(Default)]
    pub struct Builder {
        types: Vec<u8>,
        strings: Vec<u8>,
        count: u32,
    }

    impl Builder {
        pub fn new() -> Self {
            Self {
                strings: vec![0],
                ..Self::default()
            }
        }

        fn name(&mut self, name: &str) -> u32 {
            if name.is_empty() {
                return 0;
            }
            let at = self.strings.len() as u32;
            self.strings.extend(name.bytes());
            self.strings.push(0);
            at
        }

        pub fn add(&mut self, name: &str, kind: u32, vlen: u32, value: u32, rest: &[u32]) -> u32 {
            let name = self.name(name);
            for word in [name, kind << 24 | vlen, value].iter().chain(rest) {
                self.types.extend(word.to_ne_bytes());
            }
            self.count += 1;
            self.count
        }

        /// Members are (name, type, bit offset).
        pub fn composite(&mut self, name: &str, kind: u32, members: &[(&str, u32, u32)]) -> u32 {
            let mut rest = Vec::new();
            for (name, type_id, bits) in members {
                rest.extend([self.name(name), *type_id, *bits]);
            }
            self.add(name, kind, members.len() as u32, 64, &rest)
        }

        pub fn blob(&self) -> Vec<u8> {
            let mut blob = Vec::new();
            blob.extend(MAGIC.to_ne_bytes());
            blob.extend([1, 0]);
            let types = self.types.len() as u32;
            for word in [24, 0, types, types, self.strings.len() as u32] {
                blob.extend(u32::to_ne_bytes(word));
            }
            blob.extend(&self.types);
            blob.extend(&self.strings);
            blob
        }
    }

    const WANTED: &[Wanted] = &[
        (KIND_STRUCT, "net"),
        (KIND_STRUCT, "bits"),
        (KIND_STRUCT, "loop"),
        (KIND_STRUCT, "s"),
        (KIND_FUNC, "tcp_connect"),
        (KIND_TYPEDEF, "btf_trace_x"),
        (KIND_TYPEDEF, "tcp_connect"),
    ];

    fn sample() -> Vec<u8> {
        let mut b = Builder::new();
        let int = b.add("int", 1, 0, 4, &[32]);
        let inner = b.composite("", KIND_STRUCT, &[("x", int, 0), ("y", int, 32)]);
        let union = b.composite("", KIND_UNION, &[("raw", int, 0), ("", inner, 0)]);
        let common = b.composite(
            "ns_common",
            KIND_STRUCT,
            &[("ops", int, 0), ("inum", int, 96)],
        );
        let alias = b.add("ns_t", KIND_TYPEDEF, 0, common, &[]);
        let constant = b.add("", 10, 0, alias, &[]);
        b.add("", 13, 2, 0, &[0, int, 0, int]);
        // A forward twin and an empty namesake come first.
        b.add("net", 7, 0, 0, &[]);
        b.composite("net", KIND_STRUCT, &[]);
        b.composite(
            "net",
            KIND_STRUCT,
            &[("count", int, 0), ("", union, 64), ("ns", constant, 160)],
        );
        b.add("tcp_connect", KIND_FUNC, 0, 7, &[]);
        b.add("btf_trace_x", KIND_TYPEDEF, 0, 1, &[]);
        b.composite("bits", KIND_STRUCT, &[("flag", int, 3)]);
        b.blob()
    }

    #[test]
    fn finds_members_through_anonymous_typedefs_and_qualifiers() {
        let blob = sample();
        let btf = Btf::parse(&blob, WANTED).unwrap();
        assert_eq!(btf.offset("net", "count"), Ok(0));
        assert_eq!(btf.offset("net", "raw"), Ok(8));
        assert_eq!(btf.offset("net", "y"), Ok(12));
        assert_eq!(btf.offset("net", "ns.inum"), Ok(20 + 12));
        for (container, path) in [
            ("net", "nope"),
            ("net", "ns.nope"),
            ("net", "count.x"),
            ("net", ""),
            ("nope", "x"),
            ("bits", "flag"),
        ] {
            assert!(btf.offset(container, path).is_err(), "{container}.{path}");
        }
        assert_eq!(btf.bit_offset("bits", "flag"), Ok(3));
        assert_eq!(btf.bit_offset("net", "y"), Ok(96));
        assert!(btf.bit_offset("net", "nope").is_err());
    }

    #[test]
    fn finds_ids_by_kind_and_name() {
        let blob = sample();
        let btf = Btf::parse(&blob, WANTED).unwrap();
        assert_eq!(btf.index.len(), 13);
        assert_eq!(btf.id(KIND_FUNC, "tcp_connect"), Some(11));
        assert_eq!(btf.id(KIND_TYPEDEF, "btf_trace_x"), Some(12));
        assert_eq!(btf.id(KIND_TYPEDEF, "tcp_connect"), None);
    }

    #[test]
    fn every_cut_and_every_flipped_byte_is_survived() {
        let blob = sample();
        for len in 0..blob.len() {
            assert!(Btf::parse(&blob[..len], WANTED).is_err(), "cut at {len}");
        }
        for at in 0..blob.len() {
            for value in [0x00, 0x7f, 0x80, 0xff, blob[at] ^ 1] {
                let mut bad = blob.clone();
                bad[at] = value;
                if let Ok(btf) = Btf::parse(&bad, WANTED) {
                    let _ = btf.offset("net", "ns.inum");
                    let _ = btf.offset("net", "y");
                    let _ = btf.id(KIND_FUNC, "tcp_connect");
                }
            }
        }
    }

    #[test]
    fn a_structure_that_contains_itself_ends() {
        let mut b = Builder::new();
        // Type 1 has two anonymous members of type 1.
        b.composite("loop", KIND_STRUCT, &[("", 1, 0), ("", 1, 0)]);
        let blob = b.blob();
        assert!(
            Btf::parse(&blob, WANTED)
                .unwrap()
                .offset("loop", "x")
                .is_err()
        );
        let mut b = Builder::new();
        b.add("t", KIND_TYPEDEF, 0, 1, &[]);
        b.composite("s", KIND_STRUCT, &[("m", 1, 0)]);
        let blob = b.blob();
        assert!(
            Btf::parse(&blob, WANTED)
                .unwrap()
                .offset("s", "m.x")
                .is_err()
        );
    }

    #[test]
    fn unknown_kinds_are_named() {
        let mut b = Builder::new();
        b.add("new", 25, 0, 0, &[]);
        assert_eq!(
            Btf::parse(&b.blob(), WANTED).unwrap_err(),
            BtfError::UnknownKind(25)
        );
    }
}
