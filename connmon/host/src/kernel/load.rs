//! The embedded object → maps and programs ready to be loaded, with offsets
//! from the kernel's BTF in their globals.

use aya::{Btf, Ebpf, EbpfError, EbpfLoader, Endianness};
use connmon_common::tuning::{self, Field, SockCommon, global};

use super::btf::{self, KIND_FUNC, KIND_STRUCT, KIND_TYPEDEF, Wanted};
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

/// Types that programs attach to by BTF id.
const ATTACH: [Wanted; 3] = [
    (KIND_TYPEDEF, "btf_trace_inet_sock_set_state"),
    (KIND_FUNC, "tcp_connect"),
    (KIND_FUNC, "inet_csk_accept"),
];
/// A helper that programs call if the kernel has it.
const TASK_FUNC: Wanted = (KIND_FUNC, "bpf_get_current_task_btf");

/// What the agent takes from the kernel's BTF.
#[derive(Debug)]
pub struct KernelTypes {
    /// By [`Field`]; 0 for what is missing for the scan.
    offsets: [u32; Field::COUNT],
    /// Whether there is [`TASK_FUNC`].
    task_btf: bool,
    /// [`ATTACH`] under their kernel ids, for aya.
    pub attach: Btf,
    /// Why the socket table cannot be scanned, if so.
    pub no_table: Option<String>,
}

impl KernelTypes {
    /// Reads and resolves the kernel's BTF.
    ///
    /// # Errors
    ///
    /// Why that is impossible, in words.
    pub fn read() -> Result<Self, String> {
        let blob = std::fs::read(btf::SYS_PATH)
            .map_err(|error| format!("no kernel BTF ({}: {error})", btf::SYS_PATH))?;
        Self::resolve(&blob)
    }

    fn resolve(blob: &[u8]) -> Result<Self, String> {
        let types = btf::Btf::parse(blob, &wanted())?;
        for (member, expected) in SockCommon::ASSERTED {
            let offset = types.offset("sock_common", member)?;
            if offset as usize != *expected {
                return Err(format!(
                    "sock_common.{member} is at offset {offset}, not {expected}"
                ));
            }
        }
        let mut offsets = [0; Field::COUNT];
        let mut no_table = None;
        for (field, place) in Field::ALL.iter().zip(&mut offsets) {
            let (container, path) = field.member();
            let offset = match field {
                Field::Repair => types.bit_offset(container, path),
                _ => types.offset(container, path),
            };
            match offset {
                Ok(offset) => *place = offset,
                Err(error) if field.is_for_scan() => no_table = no_table.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        Ok(Self {
            offsets,
            task_btf: types.id(TASK_FUNC).is_some(),
            attach: attach_types(&types)?,
            no_table,
        })
    }
}

/// Everything that is looked up by name.
fn wanted() -> Vec<Wanted> {
    let structs = Field::ALL
        .iter()
        .map(|field| (KIND_STRUCT, field.member().0));
    let mut wanted: Vec<_> = structs.chain(ATTACH).chain([TASK_FUNC]).collect();
    wanted.sort_unstable();
    wanted.dedup();
    wanted
}

/// A stub of the kernel's BTF that has only [`ATTACH`], under their own ids.
/// aya looks up nothing else, and its parse of the real BTF takes 20 MB.
fn attach_types(types: &btf::Btf<'_>) -> Result<Btf, String> {
    const KIND_PTR: u32 = 2;
    let mut named: Vec<_> = (ATTACH.iter())
        .filter_map(|wanted| Some((types.id(*wanted)?, *wanted)))
        .collect();
    named.sort_unstable();
    let mut records: Vec<u32> = Vec::new();
    let mut strings = vec![0u8];
    for (id, (kind, name)) in named {
        // Three words a type, and ids begin at 1.
        let before = (id as usize - 1) * 3;
        while records.len() < before {
            records.extend([0, KIND_PTR << 24, 0]);
        }
        records.extend([strings.len() as u32, kind << 24, 0]);
        strings.extend(name.bytes());
        strings.push(0);
    }
    let mut blob = btf::header(records.len() as u32 * 4, strings.len() as u32);
    blob.extend(records.iter().flat_map(|word| word.to_ne_bytes()));
    blob.extend(strings);
    Btf::parse(&blob, Endianness::default())
        .map_err(|error| format!("the stub of the kernel's BTF does not parse: {error}"))
}

/// A loader without the kernel's BTF. The constructor reads and parses it in any
/// case, which takes 27 MB and, in a debug build, 200 ms; so it runs on a thread
/// that may not read files. Without Landlock (5.13) the cost remains.
fn empty_loader() -> EbpfLoader<'static> {
    use landlock::{AccessFs, Ruleset, RulesetAttr as _};
    let construct = || {
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        loader
    };
    let confined = move || {
        // Confines this thread alone.
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
            options.drop_loopback && types.is_some(),
        ),
        (global::OWNERS, options.owners),
        (global::TRAFFIC, options.traffic),
        (global::OFFSETS_KNOWN, types.is_some()),
        (global::TASK_BTF, types.is_some_and(|types| types.task_btf)),
    ]
    .map(|(name, on)| (name, u32::from(on)));
    let only_netns = options.only_netns.unwrap_or(0);
    let offsets = types.map_or([0; Field::COUNT], |types| types.offsets);
    let log_level = if options.logs() {
        aya_log::Level::Debug as u8
    } else {
        // Nobody reads the log's ring then.
        loader.map_max_entries("AYA_LOGS", 4096);
        0
    };
    loader
        .map_max_entries(tuning::EVENTS_MAP, options.ring_buffer_bytes)
        .override_global(global::WAKE_BYTES, &wake_bytes, true)
        .override_global(global::ONLY_NETNS, &only_netns, true)
        .override_global(global::OFFSETS, &offsets, true)
        .override_global(aya_log::LEVEL, &log_level, false);
    for (name, value) in &switches {
        loader.override_global(name, value, true);
    }
    loader.load(OBJECT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aya_obj::btf::BtfKind;

    #[test]
    fn stub_btf_keeps_the_kernels_ids() {
        // Needs no privilege, only a kernel that shows its BTF.
        let Ok(blob) = std::fs::read(btf::SYS_PATH) else {
            println!("not applicable: BTF ids: this kernel shows no BTF");
            return;
        };
        let real = btf::Btf::parse(&blob, &wanted()).unwrap();
        let types = KernelTypes::resolve(&blob).unwrap();
        for wanted @ (kind, name) in ATTACH {
            let kind = match kind {
                KIND_FUNC => BtfKind::Func,
                _ => BtfKind::Typedef,
            };
            let stub = types.attach.id_by_type_name_kind(name, kind).ok();
            assert_eq!(stub, real.id(wanted), "{name}");
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
            let mut members: Vec<(&str, u32, u32)> = (Field::ALL.iter())
                .filter(|field| field.member().0 == container && !field.is_for_scan())
                .zip(1..)
                .map(|(field, at)| match field.member().1.split_once('.') {
                    Some((outer, _)) => (outer, inner, at * 1024),
                    None => (field.member().1, int, at * 1024),
                })
                .collect();
            if container == "sock_common" {
                members.extend(SockCommon::ASSERTED.iter().map(|(member, offset)| {
                    let by = if *member == moved { 8 } else { 0 };
                    (*member, int, (*offset as u32 + by) * 8)
                }));
            }
            b.composite(container, KIND_STRUCT, &members);
        }
        b.blob()
    }

    #[test]
    fn moved_member_is_refused() {
        let types = KernelTypes::resolve(&kernel_types("none")).unwrap();
        let offset = |field| types.offsets[field as usize];
        assert_eq!(offset(Field::NetInum), 128 + 8);
        assert_eq!(offset(Field::Repair) % 1024, 0, "in bits");
        assert_eq!(offset(Field::SkNode), 0, "no socket table");
        assert!(types.no_table.as_ref().unwrap().contains("nsproxy"));
        for (member, offset) in SockCommon::ASSERTED {
            assert_eq!(
                KernelTypes::resolve(&kernel_types(member)).unwrap_err(),
                format!(
                    "sock_common.{member} is at offset {}, not {offset}",
                    offset + 8
                )
            );
        }
    }
}
