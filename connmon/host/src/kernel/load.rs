//! From the embedded object to maps and programs ready to be loaded: offsets
//! resolved, globals filled in.

use aya::{Btf, Ebpf, EbpfError, EbpfLoader, Endianness};
use connmon_common::tuning::{self, BITS, FIELDS, TABLE_FIELDS, global, sock_common};

use super::btf::{self, BtfError, KIND_FUNC, KIND_STRUCT, KIND_TYPEDEF, Wanted};
use super::{TracerOptions, sys};

/// The programs, built by `cargo xtask build-ebpf`.
#[cfg(target_arch = "x86_64")]
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../bpf/connmon-x86_64.o"
));
/// The programs, built by `cargo xtask build-ebpf`.
#[cfg(target_arch = "aarch64")]
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../bpf/connmon-aarch64.o"
));
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("connmon has BPF objects for x86_64 and aarch64 only");

/// What attaches by BTF id, and the structures that programs read.
const WANTED: &[Wanted] = &[
    STATE_TYPEDEF,
    CONNECT_FUNC,
    ACCEPT_FUNC,
    (KIND_STRUCT, "sock_common"),
    (KIND_STRUCT, "net"),
    (KIND_STRUCT, "sock"),
    (KIND_STRUCT, "inet_sock"),
    (KIND_STRUCT, "tcp_sock"),
    (KIND_STRUCT, "task_struct"),
    (KIND_STRUCT, "nsproxy"),
    (KIND_STRUCT, "inet_hashinfo"),
    TASK_FUNC,
];
const STATE_TYPEDEF: Wanted = (KIND_TYPEDEF, "btf_trace_inet_sock_set_state");
const CONNECT_FUNC: Wanted = (KIND_FUNC, "tcp_connect");
const ACCEPT_FUNC: Wanted = (KIND_FUNC, "inet_csk_accept");
/// A helper that programs use where the kernel has it.
const TASK_FUNC: Wanted = (KIND_FUNC, "bpf_get_current_task_btf");

/// What the agent takes from the kernel's BTF.
#[derive(Debug)]
pub struct KernelTypes {
    /// One per [`FIELDS`].
    offsets: Vec<u32>,
    /// One per [`BITS`].
    bits: Vec<u32>,
    /// Whether there is [`TASK_FUNC`].
    task_btf: bool,
    /// For aya: the types that programs attach to, under their kernel ids.
    pub attach: Btf,
    /// One per [`TABLE_FIELDS`], or why there is none.
    table: Result<Vec<u32>, BtfError>,
}

impl KernelTypes {
    /// Reads and resolves the kernel's BTF; the reason in words when that
    /// cannot be had.
    pub fn read() -> Result<Self, String> {
        let blob = std::fs::read(btf::SYS_PATH)
            .map_err(|error| format!("no kernel BTF ({}: {error})", btf::SYS_PATH))?;
        Self::resolve(&blob).map_err(|error| error.to_string())
    }

    /// Why the table of sockets cannot be found, if so.
    pub fn no_table(&self) -> Option<String> {
        Some(self.table.as_ref().err()?.to_string())
    }

    fn resolve(blob: &[u8]) -> Result<Self, BtfError> {
        let types = btf::Btf::parse(blob, WANTED)?;
        for (member, asserted) in sock_common::ASSERTED {
            let offset = types.offset("sock_common", member)?;
            if offset as usize != *asserted {
                return Err(BtfError::Moved {
                    path: format!("sock_common.{member}"),
                    offset,
                    expected: *asserted as u32,
                });
            }
        }
        let offsets = FIELDS
            .iter()
            .map(|field| types.offset(field.container, field.path))
            .collect::<Result<_, _>>()?;
        let bits = BITS
            .iter()
            .map(|field| types.bit_offset(field.container, field.path))
            .collect::<Result<_, _>>()?;
        let attach = attach_types(&types)?;
        let table = TABLE_FIELDS
            .iter()
            .map(|field| types.offset(field.container, field.path))
            .collect();
        Ok(Self {
            offsets,
            bits,
            task_btf: types.id(TASK_FUNC.0, TASK_FUNC.1).is_some(),
            attach,
            table,
        })
    }
}

/// A surrogate id for the kernel's BTF in which only the types that programs
/// attach to exist, under their own ids: aya asks it for nothing else, and
/// its parse of the real one takes 20 MB.
fn attach_types(types: &btf::Btf<'_>) -> Result<Btf, BtfError> {
    const BTF_KIND_PTR: u32 = 2;
    let mut named: Vec<(u32, Wanted)> = [STATE_TYPEDEF, CONNECT_FUNC, ACCEPT_FUNC]
        .into_iter()
        .filter_map(|wanted| Some((types.id(wanted.0, wanted.1)?, wanted)))
        .collect();
    named.sort_unstable();
    let mut records: Vec<u8> = Vec::new();
    let mut strings = vec![0u8];
    let mut push = |name: u32, kind: u32| {
        for word in [name, kind << 24, 0] {
            records.extend(word.to_ne_bytes());
        }
    };
    let mut next = 1;
    for (id, (kind, name)) in named {
        while next < id {
            push(0, BTF_KIND_PTR);
            next += 1;
        }
        push(strings.len() as u32, kind);
        next += 1;
        strings.extend(name.bytes());
        strings.push(0);
    }
    let mut blob = Vec::with_capacity(24 + records.len() + strings.len());
    blob.extend(btf::MAGIC.to_ne_bytes());
    blob.extend([1, 0]);
    let type_len = records.len() as u32;
    for word in [24, 0, type_len, type_len, strings.len() as u32] {
        blob.extend(u32::to_ne_bytes(word));
    }
    blob.extend(records);
    blob.extend(strings);
    Btf::parse(&blob, Endianness::default())
        .map_err(|_| BtfError::Malformed("attach types do not parse"))
}

/// A loader without the kernel's BTF. Its constructor reads and parses that
/// whatever comes after, which takes 27 MB and 200 ms in a debug build; so it
/// runs on a thread that may not read files. Where the kernel has no Landlock
/// (5.13), it costs what it costs.
fn empty_loader() -> EbpfLoader<'static> {
    use landlock::{AccessFs, Ruleset, RulesetAttr as _};
    let construct = || {
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        loader
    };
    let confined = move || {
        // Of this thread alone, and gone with it.
        let _ = Ruleset::default()
            .handle_access(AccessFs::from_read(landlock::ABI::V1))
            .and_then(Ruleset::create)
            .and_then(landlock::RulesetCreated::restrict_self);
        construct()
    };
    std::thread::Builder::new()
        .name("connmon-loader".into())
        .spawn(confined)
        .ok()
        .and_then(|thread| thread.join().ok())
        .unwrap_or_else(construct)
}

/// Creates the maps and prepares the programs; loads none.
pub fn prepare(options: &TracerOptions, types: Option<&KernelTypes>) -> Result<Ebpf, EbpfError> {
    let mut loader = empty_loader();
    sys::trim_memory();

    let wake_bytes = u64::from(options.ring_buffer_bytes) / 8;
    let switches = [
        (
            global::DROP_LOOPBACK,
            u32::from(options.drop_loopback && types.is_some()),
        ),
        (global::ONLY_NETNS, options.only_netns.unwrap_or(0)),
        (global::OWNERS, u32::from(options.owners)),
        (global::TRAFFIC, u32::from(options.traffic)),
        (global::OFFSETS_KNOWN, u32::from(types.is_some())),
        (
            global::TASK_BTF,
            u32::from(types.is_some_and(|types| types.task_btf)),
        ),
    ];
    let log_level = if logs(options) {
        aya_log::Level::Debug as u8
    } else {
        0
    };
    loader
        .map_max_entries(tuning::EVENTS_MAP, options.ring_buffer_bytes)
        .override_global(global::WAKE_BYTES, &wake_bytes, true)
        .override_global(aya_log::LEVEL, &log_level, false);
    if !logs(options) {
        // The log's own ring is not read then.
        loader.map_max_entries("AYA_LOGS", 4096);
    }
    for (name, value) in &switches {
        loader.override_global(name, value, true);
    }
    let (offsets, bits): (&[u32], &[u32]) = match types {
        Some(types) => (&types.offsets, &types.bits),
        None => (&[0; FIELDS.len()], &[0; BITS.len()]),
    };
    let table = types.and_then(|types| types.table.as_ref().ok());
    let known = FIELDS.iter().zip(offsets).chain(BITS.iter().zip(bits));
    let table = TABLE_FIELDS.iter().zip(table.into_iter().flatten());
    for (field, offset) in known.chain(table) {
        loader.override_global(field.global, offset, true);
    }
    loader.load(OBJECT)
}

/// Whether the programs' own diagnostics are compiled in.
pub fn logs(options: &TracerOptions) -> bool {
    options.log_level >= log::LevelFilter::Debug
}

#[cfg(test)]
mod tests {
    use super::*;
    use aya_obj::btf::BtfKind;

    #[test]
    fn the_surrogate_keeps_ids() {
        // Needs no privilege, only a kernel that shows its BTF.
        let Ok(blob) = std::fs::read(btf::SYS_PATH) else {
            println!("not applicable: BTF ids: this kernel shows no BTF");
            return;
        };
        let real = btf::Btf::parse(&blob, WANTED).unwrap();
        let types = KernelTypes::resolve(&blob).unwrap();
        for (name, kind, wanted) in [
            (STATE_TYPEDEF.1, BtfKind::Typedef, STATE_TYPEDEF),
            (CONNECT_FUNC.1, BtfKind::Func, CONNECT_FUNC),
            (ACCEPT_FUNC.1, BtfKind::Func, ACCEPT_FUNC),
        ] {
            assert_eq!(
                types.attach.id_by_type_name_kind(name, kind).ok(),
                real.id(wanted.0, wanted.1),
                "{name}"
            );
        }
    }

    /// BTF with all that is resolved, `moved` of sock_common 8 bytes later.
    fn kernel_types(moved: &str) -> Vec<u8> {
        let mut b = btf::tests::Builder::new();
        let int = b.add("int", 1, 0, 4, &[32]);
        let inner = b.composite("ns_common", KIND_STRUCT, &[("inum", int, 64)]);
        for container in [
            "sock_common",
            "net",
            "sock",
            "inet_sock",
            "tcp_sock",
            "task_struct",
        ] {
            let mut members: Vec<(&str, u32, u32)> = FIELDS
                .iter()
                .chain(BITS)
                .filter(|field| field.container == container)
                .zip(1..)
                .map(|(field, at)| match field.path.split_once('.') {
                    Some((outer, _)) => (outer, inner, at * 1024),
                    None => (field.path, int, at * 1024),
                })
                .collect();
            if container == "sock_common" {
                members.extend(sock_common::ASSERTED.iter().map(|(member, offset)| {
                    let by = if *member == moved { 8 } else { 0 };
                    (*member, int, (*offset as u32 + by) * 8)
                }));
            }
            b.composite(container, KIND_STRUCT, &members);
        }
        b.blob()
    }

    #[test]
    fn a_member_that_moved_is_refused() {
        let types = KernelTypes::resolve(&kernel_types("none")).unwrap();
        assert_eq!(types.offsets[0], 128 + 8, "net.ns.inum");
        assert_eq!(types.bits[0] % 1024, 0, "tcp_sock.repair, in bits");
        for (member, offset) in sock_common::ASSERTED {
            let expected = *offset as u32;
            assert_eq!(
                KernelTypes::resolve(&kernel_types(member)).unwrap_err(),
                BtfError::Moved {
                    path: format!("sock_common.{member}"),
                    offset: expected + 8,
                    expected,
                }
            );
        }
    }
}
