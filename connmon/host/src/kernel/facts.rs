//! What this host allows, and from that the cause and remedy of a failed
//! attach. [`HostFacts::diagnose`] is pure, so that tests cover every case.

use std::fs;
use std::io::Read as _;

use connmon_core::probe::{AttachFailure, Probe, Rung, Stage};
use libc::{EACCES, EINVAL, ENOENT, ENOMEM, ENOSYS, EPERM};
use rustix::process::{Resource, getrlimit};
use rustix::thread::CapabilitySet;

use super::tracefs::{MOUNT_TRACEFS, MOUNT_TRACEFS_OR_BTF, OPEN_TRACEFS, Tracefs};

/// Internal to the kernel, so not in libc (include/linux/errno.h).
const ENOTSUPP: i32 = 524;

/// The facts about a host that decide whether it can trace.
#[derive(Clone, Debug)]
pub struct HostFacts {
    /// `uname -r`.
    pub release: String,
    /// Whether the kernel shows its BTF.
    pub btf: bool,
    /// Active mode of `/sys/kernel/security/lockdown`; empty without that file.
    pub lockdown: String,
    /// Permitted capabilities.
    pub capabilities: CapabilitySet,
    /// Whether this thread has a seccomp filter.
    pub seccomp: bool,
    /// `RLIMIT_MEMLOCK` in bytes; `None` is unlimited.
    pub memlock_bytes: Option<u64>,
    /// Whether SELinux enforces.
    pub selinux: bool,
    /// Whether this is the host's user namespace.
    pub host_users: bool,
    /// Whether this is the host's pid namespace.
    pub host_pids: bool,
    /// Whether tracefs can be read.
    pub tracefs: Tracefs,
}

/// What a failure means.
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
    /// Reads the facts. What cannot be read counts as allowed.
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

    /// Whether this is the Windows Subsystem for Linux 2.
    pub fn is_wsl2(&self) -> bool {
        let release = self.release.to_ascii_lowercase();
        release.contains("microsoft") && release.contains("wsl2")
    }

    /// The capabilities that eBPF needs and this process lacks.
    pub fn missing_capabilities(&self) -> CapabilitySet {
        if self.capabilities.contains(CapabilitySet::SYS_ADMIN) {
            return CapabilitySet::empty();
        }
        (CapabilitySet::BPF | CapabilitySet::PERFMON) - self.capabilities
    }

    /// What the failures of the state program, or of its maps, mean here.
    /// `ring_bytes` is the requested size of the ring.
    pub fn diagnose(&self, failures: &[AttachFailure], ring_bytes: u32) -> Diagnosis {
        let (cause, remedy) = self.cause(failures, ring_bytes);
        Diagnosis {
            cause,
            remedy: remedy.into(),
        }
    }

    fn cause(&self, failures: &[AttachFailure], ring_bytes: u32) -> (String, &'static str) {
        let any = |wanted: &[i32]| failed(failures, None, wanted);
        let release = &self.release;
        let refused = any(&[EPERM, EACCES]);
        let version = self.version();
        // Some distributions backported the ring buffer to older kernels.
        if failed(failures, Some(Stage::Map), &[EINVAL]) && version < (5, 8) {
            return (
                format!("kernel {release} has no BPF ring buffer, which came with 5.8"),
                "run a newer kernel, or poll with --source proc",
            );
        }
        if refused && self.is_confidential() {
            return (
                "kernel lockdown is in confidentiality mode, in which BPF may not read kernel memory".into(),
                "boot with lockdown=integrity or without, or poll with --source proc",
            );
        }
        let missing = self.missing_capabilities();
        if refused && !missing.is_empty() {
            let names: Vec<_> = missing.iter().map(crate::sandbox::names).collect();
            return (format!("missing capability {}", names.join(" and ")), GRANT);
        }
        if failed(failures, Some(Stage::Tracefs), &[EPERM, EACCES]) {
            return ("tracefs cannot be read by this user".into(), OPEN_TRACEFS);
        }
        let limit = self.memlock_bytes.unwrap_or(u64::MAX);
        if any(&[EPERM, ENOMEM])
            && version < (5, 11)
            && limit < u64::from(ring_bytes) + (1 << 20)
            && !self.capabilities.contains(CapabilitySet::SYS_RESOURCE)
        {
            let (limit, ring) = (limit / 1024, ring_bytes / 1024);
            return (
                format!(
                    "the locked-memory limit of {limit} KiB is too small for a ring of {ring} KiB on kernel {release}"
                ),
                "set LimitMEMLOCK=infinity or ulimit -l unlimited, grant CAP_SYS_RESOURCE, or lower --ebpf.ring-buffer-size",
            );
        }
        if any(&[EACCES]) && self.selinux {
            return (
                "SELinux denies bpf() to this process".into(),
                "allow its domain class bpf { map_create map_read map_write prog_load prog_run } (see ausearch -m avc)",
            );
        }
        if refused && !self.host_users {
            return (
                "the capabilities hold in this user namespace only (a rootless container)".into(),
                "run it in the host's user namespace",
            );
        }
        if self.seccomp && any(&[EPERM, ENOSYS]) {
            return (
                "a seccomp filter denies bpf()".into(),
                "allow bpf and perf_event_open (docker --security-opt seccomp=unconfined or a profile of your own)",
            );
        }
        self.missing_feature(failures)
    }

    /// The cause where nothing denies what was tried.
    fn missing_feature(&self, failures: &[AttachFailure]) -> (String, &'static str) {
        if failed(failures, None, &[ENOSYS]) {
            return (
                format!("kernel {} has no bpf()", self.release),
                "run a kernel with CONFIG_BPF_SYSCALL, or poll with --source proc",
            );
        }
        if self.tracefs == Tracefs::Absent && !self.btf {
            return (
                "the kernel shows no BTF (CONFIG_DEBUG_INFO_BTF) and tracefs is not mounted".into(),
                MOUNT_TRACEFS_OR_BTF,
            );
        }
        if self.tracefs == Tracefs::Absent && failed(failures, Some(Stage::Tracefs), &[ENOENT]) {
            return ("tracefs is not mounted".into(), MOUNT_TRACEFS);
        }
        let failures: Vec<_> = failures.iter().map(AttachFailure::to_string).collect();
        (
            format!("the kernel refused ({})", failures.join("; ")),
            "poll with --source proc, and report this with the output of `connmon check`",
        )
    }

    /// What would attach a probe by a better method.
    pub fn remedy(&self, rung: &Rung) -> &'static str {
        let failures = &rung.failures[..];
        let at = |stage| failures.iter().any(|failure| failure.stage == stage);
        let refused = failed(failures, None, &[EPERM, EACCES]);
        if at(Stage::Configuration) {
            "leave --ebpf.attach at auto"
        } else if at(Stage::Btf) {
            "run a kernel with CONFIG_DEBUG_INFO_BTF"
        } else if refused && self.is_confidential() {
            "boot with lockdown=integrity or without; counts do not depend on it"
        } else if refused && !self.missing_capabilities().is_empty() {
            GRANT
        } else if rung.probe == Probe::SetState {
            "please report this line with the kernel's release"
        } else if refused && failed(failures, Some(Stage::Attach), &[ENOENT]) {
            "this kernel refuses trampolines and has no kprobes: run one with CONFIG_KPROBES; counts do not depend on it"
        } else if refused {
            "the kernel refuses trampolines and kprobes; counts do not depend on it"
        } else if failed(failures, None, &[ENOTSUPP]) {
            "this architecture has trampolines from Linux 6.4 on: run a newer kernel, or one with CONFIG_KPROBES; counts do not depend on it"
        } else {
            "run a kernel with CONFIG_KPROBES; counts do not depend on it"
        }
    }

    fn is_confidential(&self) -> bool {
        self.lockdown == "confidentiality"
    }
}

/// Whether any failed with one of these errors, at this stage if given.
fn failed(failures: &[AttachFailure], stage: Option<Stage>, errnos: &[i32]) -> bool {
    failures.iter().any(|failure| {
        stage.is_none_or(|stage| failure.stage == stage)
            && failure.errno.is_some_and(|errno| errnos.contains(&errno))
    })
}

/// How to give the agent the capabilities that it lacks.
const GRANT: &str =
    "run as root, or grant it (systemd AmbientCapabilities=, docker --cap-add, setcap)";

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

/// Whether there is BTF, not only an empty file.
fn shows_btf() -> bool {
    let mut magic = [0; 2];
    let read =
        fs::File::open(super::btf::SYS_PATH).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && u16::from_ne_bytes(magic) == super::btf::MAGIC
}

#[cfg(test)]
mod tests {
    use connmon_core::probe::Method;

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

    fn failure(method: Method, stage: Stage, errno: i32) -> AttachFailure {
        AttachFailure {
            method,
            stage,
            errno: Some(errno),
            message: format!("os error {errno}"),
            verifier_log: String::new(),
        }
    }

    fn cause(facts: &HostFacts, stage: Stage, errno: i32) -> String {
        let diagnosis = facts.diagnose(&[failure(Method::TpBtf, stage, errno)], RING);
        assert!(!diagnosis.remedy.is_empty());
        assert!(!diagnosis.to_string().contains('\n'));
        diagnosis.cause
    }

    #[test]
    fn failures_are_diagnosed() {
        let old = HostFacts {
            release: "5.4.0-150-generic".into(),
            ..root()
        };
        assert!(
            cause(&old, Stage::Map, EINVAL)
                .contains("kernel 5.4.0-150-generic has no BPF ring buffer")
        );
        // RHEL 8 has one.
        let backported = HostFacts {
            release: "4.18.0-553.el8".into(),
            ..root()
        };
        assert!(cause(&backported, Stage::Load, EINVAL).starts_with("the kernel refused"));

        let locked = HostFacts {
            lockdown: "confidentiality".into(),
            ..root()
        };
        assert!(cause(&locked, Stage::Map, EPERM).contains("lockdown"));

        let none = HostFacts {
            capabilities: CapabilitySet::empty(),
            ..root()
        };
        assert_eq!(
            cause(&none, Stage::Map, EPERM),
            "missing capability CAP_PERFMON and CAP_BPF"
        );
        let half = HostFacts {
            capabilities: CapabilitySet::BPF,
            ..root()
        };
        assert_eq!(
            cause(&half, Stage::Map, EPERM),
            "missing capability CAP_PERFMON"
        );

        let filtered = HostFacts {
            seccomp: true,
            ..root()
        };
        assert_eq!(
            cause(&filtered, Stage::Map, EPERM),
            "a seccomp filter denies bpf()"
        );
        assert_eq!(
            cause(&filtered, Stage::Map, ENOSYS),
            "a seccomp filter denies bpf()"
        );
        assert!(cause(&root(), Stage::Map, ENOSYS).contains("has no bpf()"));

        let small = HostFacts {
            release: "5.10.0-32-cloud-amd64".into(),
            memlock_bytes: Some(65536),
            capabilities: CapabilitySet::BPF | CapabilitySet::PERFMON,
            ..root()
        };
        assert!(
            cause(&small, Stage::Map, EPERM).starts_with(
                "the locked-memory limit of 64 KiB is too small for a ring of 8192 KiB"
            )
        );
        let enough = HostFacts {
            memlock_bytes: None,
            ..small
        };
        assert!(cause(&enough, Stage::Map, EPERM).starts_with("the kernel refused"));

        let enforcing = HostFacts {
            selinux: true,
            ..root()
        };
        assert!(cause(&enforcing, Stage::Load, EACCES).contains("SELinux"));

        let rootless = HostFacts {
            host_users: false,
            ..root()
        };
        assert!(cause(&rootless, Stage::Map, EPERM).contains("user namespace"));

        let bare = HostFacts {
            btf: false,
            tracefs: Tracefs::Absent,
            ..root()
        };
        assert!(cause(&bare, Stage::Tracefs, ENOENT).contains("no BTF"));
        // --ebpf.attach tracepoint on a kernel with BTF.
        let unmounted = HostFacts { btf: true, ..bare };
        let absent = failure(Method::Tracepoint, Stage::Tracefs, ENOENT);
        let diagnosis = unmounted.diagnose(&[absent], RING);
        assert_eq!(diagnosis.cause, "tracefs is not mounted");
        assert_eq!(diagnosis.remedy, MOUNT_TRACEFS);

        // The mode of tracefs comes before SELinux and seccomp.
        let closed = HostFacts {
            tracefs: Tracefs::Closed,
            selinux: true,
            seccomp: true,
            capabilities: CapabilitySet::BPF | CapabilitySet::PERFMON,
            ..root()
        };
        let unreadable = failure(Method::Tracepoint, Stage::Tracefs, EACCES);
        let diagnosis = closed.diagnose(&[unreadable], RING);
        assert!(diagnosis.cause.contains("tracefs cannot be read"));
        assert_eq!(diagnosis.remedy, OPEN_TRACEFS);

        assert!(cause(&root(), Stage::Load, 7).contains("tp_btf: os error 7"));
    }

    #[test]
    fn remedies_match_the_failures() {
        let rung = |probe, failures: &[AttachFailure]| Rung {
            probe,
            method: Method::None,
            failures: failures.to_vec(),
        };
        let trampoline = failure(Method::Fentry, Stage::Load, EPERM);
        let kprobe = failure(Method::Kprobe, Stage::Attach, ENOENT);
        let refused = rung(Probe::Connect, &[trampoline, kprobe]);
        assert!(
            root()
                .remedy(&refused)
                .contains("refuses trampolines and has no kprobes")
        );
        let locked = HostFacts {
            lockdown: "confidentiality".into(),
            ..root()
        };
        assert!(
            locked
                .remedy(&refused)
                .starts_with("boot with lockdown=integrity")
        );
        let unprivileged = HostFacts {
            capabilities: CapabilitySet::empty(),
            ..root()
        };
        assert_eq!(unprivileged.remedy(&refused), GRANT);
        let old_arm = failure(Method::Fexit, Stage::Attach, ENOTSUPP);
        let old_arm = rung(Probe::Accept, &[old_arm]);
        assert!(root().remedy(&old_arm).contains("newer kernel"));
        let excluded = failure(Method::Fexit, Stage::Configuration, 0);
        let excluded = rung(Probe::Accept, &[excluded]);
        assert_eq!(root().remedy(&excluded), "leave --ebpf.attach at auto");
        let rejected = failure(Method::TpBtf, Stage::Load, EINVAL);
        let rejected = rung(Probe::SetState, &[rejected]);
        assert!(root().remedy(&rejected).contains("report"));
    }

    #[test]
    fn lockdown_and_release_parse() {
        assert_eq!(
            active_lockdown("none [integrity] confidentiality\n"),
            "integrity"
        );
        assert_eq!(active_lockdown(""), "");
        let wsl = HostFacts {
            release: "5.15.167.4-microsoft-standard-WSL2".into(),
            ..root()
        };
        assert!(wsl.is_wsl2() && !root().is_wsl2());
        // Needs no privilege.
        assert_ne!(HostFacts::read().version(), (0, 0));
    }
}
