//! What this host allows, read once, and what follows from it when the
//! kernel says no. [`HostFacts::diagnose`] is pure, so that every case is
//! tested from recorded facts.

use std::fs;
use std::io::{self, Read as _};

use rustix::process::{Resource, getrlimit};
use rustix::thread::CapabilitySet;

use super::ladder::{ABSENT_TRACEFS, TRACEFS, UNREADABLE_TRACEFS};

/// `EPERM`, `EACCES`, `ENOMEM`, `ENOSYS`.
const EPERM: i32 = 1;
const ENOMEM: i32 = 12;
const EACCES: i32 = 13;
const ENOSYS: i32 = 38;

/// A host, as far as tracing is concerned.
#[derive(Clone, Debug)]
pub struct HostFacts {
    /// `uname -r`.
    pub release: String,
    /// Whether the kernel shows its BTF.
    pub btf: bool,
    /// Active mode of `/sys/kernel/security/lockdown`; empty when there is
    /// no such file.
    pub lockdown: String,
    /// Permitted capabilities.
    pub capabilities: CapabilitySet,
    /// Whether a seccomp filter is on this thread.
    pub seccomp: bool,
    /// `RLIMIT_MEMLOCK` in bytes; `None` is unlimited.
    pub memlock_bytes: Option<u64>,
    /// Whether SELinux enforces.
    pub selinux: bool,
    /// Whether this is the host's user namespace.
    pub host_users: bool,
    /// Whether this is the host's pid namespace.
    pub host_pids: bool,
    /// tracefs, where it belongs.
    pub tracefs: Tracefs,
}

/// What there is of tracefs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracefs {
    /// Its events are there.
    Mounted,
    /// This user may not look (it is of mode 0700 as a rule).
    Closed,
    /// It is not mounted.
    Absent,
}

impl Tracefs {
    fn read() -> Self {
        let [own, debug] = TRACEFS.map(|root| fs::metadata(format!("{root}/events")));
        match (own, debug) {
            (Ok(_), _) | (_, Ok(_)) => Self::Mounted,
            // A closed debugfs tells nothing, and need not be opened.
            (Err(error), _) if error.kind() == io::ErrorKind::PermissionDenied => Self::Closed,
            _ => Self::Absent,
        }
    }
}

/// What opens a closed tracefs.
pub const OPEN_TRACEFS: &str =
    "run as root, grant CAP_DAC_READ_SEARCH, or mount -o remount,mode=755 /sys/kernel/tracing";
/// What brings an absent one.
pub const MOUNT_TRACEFS: &str = "mount -t tracefs tracefs /sys/kernel/tracing";

/// What to say of a failure: its cause and what helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// Cause, no full stop.
    pub cause: String,
    /// Remedy, no full stop.
    pub remedy: String,
}

impl std::fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.cause, self.remedy)
    }
}

impl HostFacts {
    /// Reads them; what cannot be read counts as allowed.
    pub fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let status = text("/proc/thread-self/status");
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
                .unwrap_or_default()
                .to_owned()
        };
        Self {
            release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            btf: shows_btf(),
            lockdown: active_lockdown(&text("/sys/kernel/security/lockdown")).to_owned(),
            capabilities: crate::sandbox::held(),
            seccomp: field("Seccomp:") == "2",
            memlock_bytes: getrlimit(Resource::Memlock).current,
            selinux: text("/sys/fs/selinux/enforce").trim() == "1",
            // Initial namespaces have fixed inodes (include/linux/proc_ns.h).
            host_users: is_namespace("user", 0xefff_fffd),
            host_pids: is_namespace("pid", 0xefff_fffc),
            tracefs: Tracefs::read(),
        }
    }

    /// Major and minor version.
    pub fn version(&self) -> (u32, u32) {
        super::parse_version(&self.release)
    }

    /// Whether this is the Linux under Windows.
    pub fn is_wsl2(&self) -> bool {
        let release = self.release.to_ascii_lowercase();
        release.contains("microsoft") && release.contains("wsl2")
    }

    /// What eBPF lacks of capabilities.
    pub fn missing_capabilities(&self) -> CapabilitySet {
        if self.capabilities.contains(CapabilitySet::SYS_ADMIN) {
            return CapabilitySet::empty();
        }
        (CapabilitySet::BPF | CapabilitySet::PERFMON) - self.capabilities
    }

    /// Why tracing failed with this message; `errno` is taken from it.
    /// `ring_bytes` is the size of the ring that was asked for.
    pub fn diagnose(&self, message: &str, ring_bytes: u32) -> Diagnosis {
        let say = |cause: String, remedy: &str| Diagnosis {
            cause,
            remedy: remedy.to_owned(),
        };
        let errno = errno_in(message);
        let refused = matches!(errno, Some(EPERM | EACCES));
        let version = self.version();
        if version != (0, 0) && version < (5, 8) {
            return say(
                format!(
                    "kernel {} is older than 5.8, the first with the BPF ring buffer",
                    self.release
                ),
                "run a newer kernel, or poll with --source proc",
            );
        }
        if refused && self.lockdown == "confidentiality" {
            return say(
                "kernel lockdown is in confidentiality mode, which keeps BPF from reading kernel memory".into(),
                "boot with lockdown=integrity or without, or poll with --source proc",
            );
        }
        let missing = self.missing_capabilities();
        if refused && !missing.is_empty() {
            return say(
                format!("missing capability {}", capability_names(missing)),
                "run as root, or grant it (systemd AmbientCapabilities=, docker --cap-add, setcap)",
            );
        }
        // Of files, not of bpf().
        if message.contains(UNREADABLE_TRACEFS) {
            return say(format!("{message} by this user"), OPEN_TRACEFS);
        }
        let limit = self.memlock_bytes.unwrap_or(u64::MAX);
        if matches!(errno, Some(EPERM | ENOMEM))
            && version < (5, 11)
            && limit < u64::from(ring_bytes) + (1 << 20)
            && !self.capabilities.contains(CapabilitySet::SYS_RESOURCE)
        {
            return say(
                format!(
                    "the locked-memory limit of {} KiB is too small for a ring of {} KiB on kernel {}",
                    limit / 1024,
                    ring_bytes / 1024,
                    self.release
                ),
                "set LimitMEMLOCK=infinity or ulimit -l unlimited, grant CAP_SYS_RESOURCE, or lower --ebpf.ring-buffer-size",
            );
        }
        if errno == Some(EACCES) && self.selinux {
            return say(
                "SELinux denies bpf() to this process".into(),
                "allow its domain class bpf { map_create map_read map_write prog_load prog_run } (see ausearch -m avc)",
            );
        }
        if refused && !self.host_users {
            return say(
                "the capabilities hold in this user namespace only (a rootless container)".into(),
                "run it in the host's user namespace",
            );
        }
        if self.seccomp && matches!(errno, Some(EPERM | ENOSYS)) {
            return say(
                "a seccomp filter denies bpf()".into(),
                "allow bpf and perf_event_open (docker --security-opt seccomp=unconfined or a profile of your own)",
            );
        }
        if errno == Some(ENOSYS) {
            return say(
                format!("kernel {} has no bpf()", self.release),
                "run a kernel with CONFIG_BPF_SYSCALL, or poll with --source proc",
            );
        }
        if self.tracefs == Tracefs::Absent {
            if !self.btf {
                return say(
                    "the kernel shows no BTF (CONFIG_DEBUG_INFO_BTF) and tracefs is not mounted"
                        .into(),
                    &format!("{MOUNT_TRACEFS}, or run a kernel with BTF"),
                );
            }
            if message.contains(ABSENT_TRACEFS) {
                return say("tracefs is not mounted".into(), MOUNT_TRACEFS);
            }
        }
        say(
            format!("the kernel refused ({message})"),
            "poll with --source proc, and report this with the output of `connmon check`",
        )
    }
}

/// Comma-separated names.
fn capability_names(set: CapabilitySet) -> String {
    set.iter()
        .map(crate::sandbox::name)
        .collect::<Vec<_>>()
        .join(" and ")
}

/// `none [integrity] confidentiality` → `integrity`.
fn active_lockdown(text: &str) -> &str {
    text.split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or("", |(mode, _)| mode)
}

fn is_namespace(kind: &str, inode: u64) -> bool {
    fs::read_link(format!("/proc/self/ns/{kind}")).map_or(true, |link| {
        link.to_string_lossy() == format!("{kind}:[{inode}]")
    })
}

/// The last error number that a message of std's `io::Error` names.
fn errno_in(message: &str) -> Option<i32> {
    let (_, rest) = message.rsplit_once("(os error ")?;
    rest.split_once(')')?.0.parse().ok()
}

/// Whether there is BTF, not only its file.
fn shows_btf() -> bool {
    let mut magic = [0; 2];
    let read =
        fs::File::open(super::btf::SYS_PATH).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && u16::from_ne_bytes(magic) == super::btf::MAGIC
}

#[cfg(test)]
mod tests {
    use super::*;

    const RING: u32 = 8 << 20;

    fn root() -> HostFacts {
        HostFacts {
            release: "6.12.107+deb13-cloud-amd64".into(),
            btf: true,
            lockdown: "none".into(),
            capabilities: CapabilitySet::all(),
            seccomp: false,
            memlock_bytes: Some(8 << 20),
            selinux: false,
            host_users: true,
            host_pids: true,
            tracefs: Tracefs::Mounted,
        }
    }

    fn cause(facts: &HostFacts, message: &str) -> String {
        let diagnosis = facts.diagnose(message, RING);
        assert!(!diagnosis.remedy.is_empty());
        assert!(!diagnosis.to_string().contains('\n'));
        diagnosis.cause
    }

    const MAP_EPERM: &str =
        "map error: failed to create map `EVENTS`: Operation not permitted (os error 1)";

    #[test]
    fn every_cause_has_its_sentence() {
        let old = HostFacts {
            release: "5.4.0-150-generic".into(),
            ..root()
        };
        assert!(
            cause(&old, "Invalid argument (os error 22)")
                .contains("5.4.0-150-generic is older than 5.8")
        );

        let locked = HostFacts {
            lockdown: "confidentiality".into(),
            ..root()
        };
        assert!(cause(&locked, MAP_EPERM).contains("lockdown"));

        let none = HostFacts {
            capabilities: CapabilitySet::empty(),
            ..root()
        };
        assert_eq!(
            cause(&none, MAP_EPERM),
            "missing capability CAP_PERFMON and CAP_BPF"
        );
        let half = HostFacts {
            capabilities: CapabilitySet::BPF,
            ..root()
        };
        assert_eq!(cause(&half, MAP_EPERM), "missing capability CAP_PERFMON");

        let filtered = HostFacts {
            seccomp: true,
            ..root()
        };
        assert_eq!(cause(&filtered, MAP_EPERM), "a seccomp filter denies bpf()");
        assert_eq!(
            cause(&filtered, "x (os error 38)"),
            "a seccomp filter denies bpf()"
        );
        assert!(cause(&root(), "x (os error 38)").contains("has no bpf()"));

        let small = HostFacts {
            release: "5.10.0-32-cloud-amd64".into(),
            memlock_bytes: Some(65536),
            capabilities: CapabilitySet::BPF | CapabilitySet::PERFMON,
            ..root()
        };
        assert!(
            cause(&small, MAP_EPERM).starts_with(
                "the locked-memory limit of 64 KiB is too small for a ring of 8192 KiB"
            )
        );
        let enough = HostFacts {
            memlock_bytes: None,
            ..small
        };
        assert!(cause(&enough, MAP_EPERM).starts_with("the kernel refused"));

        let enforcing = HostFacts {
            selinux: true,
            ..root()
        };
        assert!(cause(&enforcing, "Permission denied (os error 13)").contains("SELinux"));

        let rootless = HostFacts {
            host_users: false,
            ..root()
        };
        assert!(cause(&rootless, MAP_EPERM).contains("user namespace"));

        let bare = HostFacts {
            btf: false,
            tracefs: Tracefs::Absent,
            ..root()
        };
        assert!(cause(&bare, "no kernel BTF; tracefs is not mounted").contains("no BTF"));
        // Asked for, though there is BTF.
        let unmounted = HostFacts { btf: true, ..bare };
        let diagnosis = unmounted.diagnose("tracepoint: tracefs is not mounted", RING);
        assert_eq!(diagnosis.cause, "tracefs is not mounted");
        assert_eq!(diagnosis.remedy, MOUNT_TRACEFS);

        // A mode, whatever SELinux and seccomp do besides.
        let closed = HostFacts {
            tracefs: Tracefs::Closed,
            selinux: true,
            seccomp: true,
            capabilities: CapabilitySet::BPF | CapabilitySet::PERFMON,
            ..root()
        };
        let message = "tracepoint: tracefs cannot be read (Permission denied (os error 13))";
        let diagnosis = closed.diagnose(message, RING);
        assert!(diagnosis.cause.contains("tracefs cannot be read"));
        assert_eq!(diagnosis.remedy, OPEN_TRACEFS);

        assert!(cause(&root(), "something (os error 7)").contains("something (os error 7)"));
    }

    #[test]
    fn facts_parse() {
        assert_eq!(
            active_lockdown("none [integrity] confidentiality\n"),
            "integrity"
        );
        assert_eq!(active_lockdown(""), "");
        assert_eq!(errno_in("a (os error 1); b (os error 13) c"), Some(13));
        assert_eq!(errno_in("no number"), None);
        let wsl = HostFacts {
            release: "5.15.167.4-microsoft-standard-WSL2".into(),
            ..root()
        };
        assert!(wsl.is_wsl2() && !root().is_wsl2());
        // The host's own can be read, whoever asks.
        assert_ne!(HostFacts::read().version(), (0, 0));
    }
}
