//! Which feature needs which capability, and dropping the others.
#![expect(
    unsafe_code,
    reason = "no library wraps a bpf(2) call that is meant to fail"
)]

use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::syscalls::BPF_MAP_LOOKUP_ELEM;

/// A feature that needs capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureKind {
    /// eBPF.
    Tracing,
    /// Process names, and namespaces by `/proc`.
    Owners,
    /// sock_diag in other namespaces.
    OtherNamespaces,
    /// `--ebpf.stats`.
    Stats,
    /// The ring as locked memory.
    Ring,
    /// `--web.listen-address` with a privileged port.
    LowPort,
}

/// A feature and what the kernel wants for it.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// Which.
    pub kind: FeatureKind,
    /// What it gives, in a few words.
    pub name: &'static str,
    /// Capabilities that it needs, all of them.
    pub needs: CapabilitySet,
    /// Whether they are given up when everything is attached.
    pub dropped_after_attach: bool,
    /// What happens without them.
    pub without: &'static str,
}

/// Which feature needs which capabilities, the most useful first. The tables of
/// README.md and docs/capabilities.md have its words (tests/capabilities.rs).
pub const FEATURES: &[Feature] = &[
    Feature {
        kind: FeatureKind::Tracing,
        name: "counting connections by eBPF",
        needs: CapabilitySet::BPF.union(CapabilitySet::PERFMON),
        dropped_after_attach: true,
        without: "polling of /proc/net/tcp (--source proc): gauges right at each poll, short connections missed",
    },
    Feature {
        kind: FeatureKind::Owners,
        name: "process names of listeners, and other network namespaces through /proc",
        needs: CapabilitySet::SYS_PTRACE.union(CapabilitySet::DAC_READ_SEARCH),
        dropped_after_attach: false,
        without: "process=\"unknown\" for processes of other users; namespaces are identified by /proc/<pid>/net/tcp alone",
    },
    Feature {
        kind: FeatureKind::OtherNamespaces,
        name: "sock_diag inside other network namespaces",
        needs: CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_PTRACE),
        dropped_after_attach: false,
        without: "other namespaces are read through /proc/<pid>/net/tcp: slower, and without byte counts of connections that predate the agent",
    },
    Feature {
        kind: FeatureKind::Stats,
        name: "run time of the programs (--ebpf.stats)",
        needs: CapabilitySet::SYS_ADMIN,
        dropped_after_attach: true,
        without: "connmon_bpf_program_* only if kernel.bpf_stats_enabled=1 is set by other means",
    },
    Feature {
        kind: FeatureKind::Ring,
        name: "an 8 MiB ring before Linux 5.11, where it counts as locked memory",
        needs: CapabilitySet::SYS_RESOURCE,
        dropped_after_attach: true,
        without: "LimitMEMLOCK=infinity (systemd) or ulimit -l unlimited does the same",
    },
    Feature {
        kind: FeatureKind::LowPort,
        name: "a listening port below 1024",
        needs: CapabilitySet::NET_BIND_SERVICE,
        dropped_after_attach: true,
        without: "a port from 1024 on, the default 19910 included",
    },
];

/// Permitted capabilities of the calling thread; empty when they cannot be
/// read.
pub fn held() -> CapabilitySet {
    capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted)
}

/// Which capabilities for counting by eBPF the calling thread lacks, and the
/// remedy; `None` when it has them. CAP_SYS_ADMIN includes both
/// (`bpf_capable()` and `perfmon_capable()`, include/linux/capability.h).
pub fn missing_for_tracing() -> Option<String> {
    let held = held();
    let missing = FEATURES[0].needs - held;
    if missing.is_empty() || held.contains(CapabilitySet::SYS_ADMIN) {
        return None;
    }
    Some(format!(
        "{} missing, run as root or grant them",
        names(missing).replace(',', " and ")
    ))
}

/// Comma-separated names as in capabilities(7), `none` for the empty set.
pub fn names(set: CapabilitySet) -> String {
    if set.is_empty() {
        return "none".to_owned();
    }
    let known: Vec<String> = (set & CapabilitySet::all())
        .iter_names()
        .map(|(name, _)| format!("CAP_{name}"))
        .collect();
    known.join(",")
}

/// What the walker needs for the features that are on.
pub(super) fn walker_needs(all_netns: bool, listeners: bool) -> CapabilitySet {
    let mut needs = CapabilitySet::empty();
    if all_netns || listeners {
        needs |= CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH;
    }
    if all_netns {
        needs |= CapabilitySet::SYS_ADMIN;
    }
    needs
}

/// Leaves the calling thread with `wanted` as far as it has them, permitted and
/// effective, nothing inheritable. The ambient set follows the permitted one
/// (`cap_capset()` in security/commoncap.c). The bounding set is emptied where
/// CAP_SETPCAP allows it; elsewhere `no_new_privs` makes it moot.
pub(super) fn keep(wanted: CapabilitySet) -> io::Result<()> {
    let sets = capabilities(None)?;
    if sets.effective.contains(CapabilitySet::SETPCAP) {
        for bit in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << bit);
            // EINVAL past the last capability of this kernel.
            if rustix::thread::remove_capability_from_bounding_set(one).is_err() {
                break;
            }
        }
    }
    let left = sets.permitted & wanted;
    set_capabilities(
        None,
        CapabilitySets {
            effective: left,
            permitted: left,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}

/// Drops everything but `wanted`, and CAP_BPF where map lookups need it: before
/// Linux 6.0 `__sys_bpf()` refuses every command without it while
/// `kernel.unprivileged_bpf_disabled` is not 0.
pub(super) fn keep_for_map_lookups(wanted: CapabilitySet) -> io::Result<()> {
    keep_if(wanted, CapabilitySet::BPF, lookup_is_refused)
}

/// Drops everything, but CAP_DAC_READ_SEARCH only if every one of `files` that
/// opens now still opens without it: reloading the key file of another user must
/// not fail months later.
pub(super) fn keep_for_files(files: &[PathBuf]) -> io::Result<()> {
    let readable = |file: &&PathBuf| {
        // Opening anything but a regular file may wait, or have effects.
        let regular = std::fs::metadata(file).is_ok_and(|metadata| metadata.is_file());
        let mut options = std::fs::OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        regular && options.open(file).is_ok()
    };
    let before: Vec<&PathBuf> = files.iter().filter(readable).collect();
    // Root reads through CAP_DAC_OVERRIDE; the narrower one is enough.
    let is_needed = || !before.iter().all(readable);
    keep_if(
        CapabilitySet::empty(),
        CapabilitySet::DAC_READ_SEARCH,
        is_needed,
    )
}

/// Drops everything but `wanted`, and `perhaps` if `is_needed` returns true
/// while it is not effective.
fn keep_if(
    wanted: CapabilitySet,
    perhaps: CapabilitySet,
    is_needed: impl FnOnce() -> bool,
) -> io::Result<()> {
    keep(wanted | perhaps)?;
    let mut sets = capabilities(None)?;
    sets.effective -= perhaps;
    set_capabilities(None, sets)?;
    if !is_needed() {
        return keep(wanted);
    }
    sets.effective = sets.permitted;
    Ok(set_capabilities(None, sets)?)
}

/// Whether bpf(BPF_MAP_LOOKUP_ELEM) is refused for lack of privilege: EPERM, where
/// a map that does not exist gives EBADF.
fn lookup_is_refused() -> bool {
    /// Longer than the part of `union bpf_attr` that any lookup uses.
    const ATTR_BYTES: usize = 64;
    let mut attr = [0u8; ATTR_BYTES];
    attr[..4].copy_from_slice(&(-1i32).to_ne_bytes());
    // SAFETY: `attr` is a live, writable buffer of ATTR_BYTES bytes, the size
    // passed; its first field, map_fd, is -1, so that the kernel finds no map
    // and neither reads nor writes through the (null) key and value pointers
    // that follow. This function upholds both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            libc::c_long::from(BPF_MAP_LOOKUP_ELEM),
            attr.as_mut_ptr(),
            ATTR_BYTES,
        )
    };
    result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_manual() {
        assert_eq!(names(CapabilitySet::empty()), "none");
        assert_eq!(names(CapabilitySet::DAC_READ_SEARCH), "CAP_DAC_READ_SEARCH");
        assert_eq!(
            names(CapabilitySet::BPF | CapabilitySet::SYS_ADMIN),
            "CAP_SYS_ADMIN,CAP_BPF"
        );
    }

    #[test]
    fn the_walker_keeps_only_what_its_features_need() {
        assert_eq!(walker_needs(false, false), CapabilitySet::empty());
        assert!(!walker_needs(false, true).contains(CapabilitySet::SYS_ADMIN));
        assert!(walker_needs(true, false).contains(CapabilitySet::SYS_ADMIN));
        let all = FEATURES
            .iter()
            .fold(CapabilitySet::empty(), |all, feature| all | feature.needs);
        assert!(all.contains(walker_needs(true, true)));
    }
}
