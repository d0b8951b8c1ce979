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
        let mut blob = header(self.types.len() as u32, self.strings.len() as u32);
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
    // A forward declaration and an empty struct of this name come first.
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
fn finds_nested_and_anonymous_members() {
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
    assert_eq!(btf.id((KIND_FUNC, "tcp_connect")), Some(11));
    assert_eq!(btf.id((KIND_TYPEDEF, "btf_trace_x")), Some(12));
    assert_eq!(btf.id((KIND_TYPEDEF, "tcp_connect")), None);
}

#[test]
fn truncated_and_corrupt_btf_does_not_panic() {
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
                let _ = btf.id((KIND_FUNC, "tcp_connect"));
            }
        }
    }
}

#[test]
fn recursive_structure_is_not_followed_forever() {
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
fn unknown_kind_is_named() {
    let mut b = Builder::new();
    b.add("new", 25, 0, 0, &[]);
    assert_eq!(
        Btf::parse(&b.blob(), WANTED).unwrap_err(),
        "BTF has a type of unknown kind 25"
    );
}
