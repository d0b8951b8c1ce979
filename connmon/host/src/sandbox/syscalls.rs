//! seccomp: the system calls that each role may make. Every other one gets
//! EPERM.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

use super::Role;

/// Puts the filter of a role in force in the calling thread.
pub(super) fn filter(role: Role) -> Result<(), String> {
    // The flags of clone3 are in memory, which no filter can read. On ENOSYS
    // glibc falls back to clone, whose flags are an argument. Of two filters
    // the stricter one holds, so the second may allow clone3.
    let no_clone3 = compile(
        [(libc::SYS_clone3, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    );
    let mut rules = rules(role).map_err(|error| error.to_string())?;
    rules.insert(libc::SYS_clone3, Vec::new());
    let allowed = compile(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
    );
    for program in [no_clone3, allowed] {
        let program = program.map_err(|error| error.to_string())?;
        seccompiler::apply_filter(&program).map_err(|error| {
            let cause = std::error::Error::source(&error)
                .map_or_else(|| error.to_string(), ToString::to_string);
            format!("the kernel refused the filter ({cause}): CONFIG_SECCOMP_FILTER is needed")
        })?;
    }
    Ok(())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    on_match: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, otherwise, on_match, arch)?.try_into()
}

/// Allowed with any arguments, in every role.
const EVERYWHERE: &[c_long] = &[
    // Descriptors that are already open, and reading files.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_fadvise64,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    // Memory; mmap and mprotect are below.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    // Clocks, random numbers, ids.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrusage,
    libc::SYS_getcpu,
    libc::SYS_sched_getaffinity,
    libc::SYS_capget,
    // Threads, signals, exit.
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Older system calls that only x86-64 has; glibc still prefers some of them.
#[cfg(target_arch = "x86_64")]
const EVERYWHERE_LEGACY: &[c_long] = &[
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_time,
    libc::SYS_dup2,
];
#[cfg(not(target_arch = "x86_64"))]
const EVERYWHERE_LEGACY: &[c_long] = &[];

/// Reading netlink, and whether a file is a mounted namespace.
const WALKER: &[c_long] = &[libc::SYS_statfs, libc::SYS_recvfrom];

/// The async runtime reads its signal pipe; the fold has no other socket.
const FOLD: &[c_long] = &[libc::SYS_recvfrom];

/// HTTP on listeners that already listen. No socket(), connect() or bind(), and
/// no sendmsg(), whose address is in memory, which no filter can read: the
/// thread cannot connect to anything.
const SERVE: &[c_long] = &[libc::SYS_accept4, libc::SYS_recvfrom];

fn rules(role: Role) -> Result<Rules, BackendError> {
    let own: &[c_long] = match role {
        Role::Walker => WALKER,
        Role::Fold => FOLD,
        Role::Serve => SERVE,
        Role::Log | Role::Tool => &[],
    };
    let mut rules: Rules = [EVERYWHERE, EVERYWHERE_LEGACY, own]
        .into_iter()
        .flatten()
        .map(|&call| (call, Vec::new()))
        .collect();
    let mut allow_if = |call: c_long, conditions: Vec<SeccompCondition>| {
        let rule = SeccompRule::new(conditions)?;
        rules.entry(call).or_default().push(rule);
        Ok::<(), BackendError>(())
    };

    // Files are read, never made, written or truncated.
    allow_if(libc::SYS_openat, vec![without(2, WRITING)?])?;
    #[cfg(target_arch = "x86_64")]
    allow_if(libc::SYS_open, vec![without(1, WRITING)?])?;
    // No executable memory beyond what was loaded at exec.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        allow_if(call, vec![without(2, libc::PROT_EXEC)?])?;
    }
    // Threads, not processes and not namespaces.
    allow_if(
        libc::SYS_clone,
        vec![masked(
            0,
            libc::CLONE_THREAD | NAMESPACES,
            libc::CLONE_THREAD,
        )?],
    )?;
    // A signal to the own process: abort().
    allow_if(libc::SYS_tgkill, vec![equal(0, std::process::id())?])?;
    // Reading limits, not setting them: the new limit is null.
    allow_if(libc::SYS_prlimit64, vec![null(2)?])?;
    for option in [libc::PR_SET_NAME, libc::PR_GET_NAME] {
        allow_if(libc::SYS_prctl, vec![equal(0, option as u32)?])?;
    }
    for request in [
        libc::FIONBIO,
        libc::FIOCLEX,
        libc::FIONREAD,
        libc::TCGETS,
        libc::TIOCGWINSZ,
    ] {
        allow_if(libc::SYS_ioctl, vec![equal(1, request as u32)?])?;
    }

    // To where the socket is connected, as a signal handler of the runtime does
    // in any thread. An address would connect a listener that was shut down
    // (tcp_sendmsg_fastopen() in net/ipv4/tcp.c) and send a datagram anywhere.
    allow_if(libc::SYS_sendto, vec![null(4)?])?;
    // Not F_SETOWN, which sends signals to another process.
    for command in [
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
    ] {
        allow_if(libc::SYS_fcntl, vec![equal(1, command as u32)?])?;
    }

    match role {
        Role::Walker => {
            allow_if(libc::SYS_setns, vec![equal(1, libc::CLONE_NEWNET as u32)?])?;
            allow_if(
                libc::SYS_socket,
                vec![
                    equal(0, libc::AF_NETLINK as u32)?,
                    equal(2, libc::NETLINK_SOCK_DIAG as u32)?,
                ],
            )?;
            // To the kernel. An Internet address is longer, so no other
            // thread's socket can be connected by this.
            let length = size_of::<libc::sockaddr_nl>() as u32;
            const { assert!(size_of::<libc::sockaddr_nl>() < size_of::<libc::sockaddr_in>()) };
            allow_if(libc::SYS_connect, vec![equal(2, length)?])?;
            for option in [SO_RCVTIMEO_NEW, libc::SO_RCVTIMEO as u32] {
                allow_if(
                    libc::SYS_setsockopt,
                    vec![equal(1, libc::SOL_SOCKET as u32)?, equal(2, option)?],
                )?;
            }
            allow_if(libc::SYS_bpf, vec![equal(0, BPF_PROG_TEST_RUN)?])?;
        }
        Role::Fold => {
            for command in [BPF_MAP_LOOKUP_ELEM, BPF_OBJ_GET_INFO_BY_FD] {
                allow_if(libc::SYS_bpf, vec![equal(0, command)?])?;
            }
            // Detaching a kprobe at the end.
            allow_if(libc::SYS_ioctl, vec![equal(1, PERF_EVENT_IOC_DISABLE)?])?;
        }
        Role::Serve => {
            allow_if(libc::SYS_shutdown, vec![equal(1, libc::SHUT_WR as u32)?])?;
            allow_if(
                libc::SYS_setsockopt,
                vec![
                    equal(1, libc::IPPROTO_TCP as u32)?,
                    equal(2, libc::TCP_NODELAY as u32)?,
                ],
            )?;
        }
        Role::Log | Role::Tool => {}
    }
    Ok(rules)
}

/// openat flags that do more than read. `libc::O_TMPFILE` contains
/// O_DIRECTORY, which is harmless.
const WRITING: i32 =
    libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY);

/// clone flags that make a namespace.
const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID;

// `enum bpf_cmd`, include/uapi/linux/bpf.h.
pub(super) const BPF_MAP_LOOKUP_ELEM: u32 = 1;
/// A step of the socket-table scan.
const BPF_PROG_TEST_RUN: u32 = 10;
/// Run times and misses of a program.
const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;

/// include/uapi/asm-generic/socket.h (Linux 5.1); libc has the older one.
const SO_RCVTIMEO_NEW: u32 = 66;

/// `_IO('$', 1)`, include/uapi/linux/perf_event.h.
const PERF_EVENT_IOC_DISABLE: u32 = 0x2401;

// Arguments are C ints, whose upper half is not defined, so the lower 32 bits
// are compared; null() is about a pointer.

fn equal(argument: u8, value: u32) -> Result<SeccompCondition, BackendError> {
    let value = u64::from(value);
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn masked(argument: u8, mask: i32, value: i32) -> Result<SeccompCondition, BackendError> {
    let mask = SeccompCmpOp::MaskedEq(u64::from(mask as u32));
    let value = u64::from(value as u32);
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, mask, value)
}

fn without(argument: u8, flags: i32) -> Result<SeccompCondition, BackendError> {
    masked(argument, flags, 0)
}

fn null(argument: u8) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)
}

#[cfg(test)]
mod tests;
