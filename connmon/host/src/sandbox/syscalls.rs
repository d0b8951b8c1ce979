//! seccomp: the system calls that each room may make. Everything else gets
//! EPERM.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

use super::Room;

/// Puts the room's filter in force in the calling thread.
pub(super) fn filter(room: Room) -> Result<(), String> {
    // clone3's flags lie in memory, where no filter can look. ENOSYS has
    // glibc fall back to clone, whose flags are an argument. Of two filters
    // the stricter verdict holds, so that the second may allow it.
    let no_clone3 = compile(
        [(libc::SYS_clone3, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    );
    let mut rules = rules(room).map_err(|error| error.to_string())?;
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

/// Allowed whatever the arguments, in every room.
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
    // Clocks, random numbers, who am I.
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
    // Threads, signals, the end.
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The older twins that only x86-64 has; glibc still prefers some of them.
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

/// Netlink conversations, and telling mounted namespaces from other files.
const WALKER: &[c_long] = &[libc::SYS_statfs, libc::SYS_recvfrom];

/// The async runtime of every thread reads the signal pipe; the fold has no
/// other socket.
const FOLD: &[c_long] = &[libc::SYS_recvfrom];

/// HTTP on listeners that already listen. No socket(), no connect(), no
/// bind(), and no sendmsg(), whose address lies in memory, where no filter
/// can look: whoever takes over a request cannot call out.
const SERVE: &[c_long] = &[libc::SYS_accept4, libc::SYS_recvfrom];

fn rules(room: Room) -> Result<Rules, BackendError> {
    let own: &[c_long] = match room {
        Room::Walker => WALKER,
        Room::Fold => FOLD,
        Room::Serve => SERVE,
        Room::Log => &[],
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

    // Files are read, never made, written or cut.
    allow_if(libc::SYS_openat, vec![without(2, WRITING)?])?;
    #[cfg(target_arch = "x86_64")]
    allow_if(libc::SYS_open, vec![without(1, WRITING)?])?;
    // No memory that can be executed, beyond what was loaded at exec.
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
    // A signal to oneself: abort().
    allow_if(libc::SYS_tgkill, vec![equal(0, own_pid())?])?;
    // Asking for limits, not setting them: the new limit is null.
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

    // To where the socket is connected; a signal handler tells the runtime so,
    // in whatever thread it runs. An address would connect a listener that was
    // shut down (tcp_sendmsg_fastopen() in net/ipv4/tcp.c) and lead a datagram
    // anywhere.
    allow_if(libc::SYS_sendto, vec![null(4)?])?;
    // Not who is sent a signal when there is something to read.
    for command in [
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
    ] {
        allow_if(libc::SYS_fcntl, vec![equal(1, command as u32)?])?;
    }

    match room {
        Room::Walker => {
            allow_if(libc::SYS_setns, vec![equal(1, libc::CLONE_NEWNET as u32)?])?;
            allow_if(
                libc::SYS_socket,
                vec![
                    equal(0, libc::AF_NETLINK as u32)?,
                    equal(2, libc::NETLINK_SOCK_DIAG as u32)?,
                ],
            )?;
            // To the kernel: shorter than any address of the Internet's, which
            // another thread's sockets could be led to.
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
        Room::Fold => {
            for command in [BPF_MAP_LOOKUP_ELEM, BPF_OBJ_GET_INFO_BY_FD] {
                allow_if(libc::SYS_bpf, vec![equal(0, command)?])?;
            }
            // Detaching a kprobe at the end.
            allow_if(libc::SYS_ioctl, vec![equal(1, PERF_EVENT_IOC_DISABLE)?])?;
        }
        Room::Serve => {
            allow_if(libc::SYS_shutdown, vec![equal(1, libc::SHUT_WR as u32)?])?;
            allow_if(
                libc::SYS_setsockopt,
                vec![
                    equal(1, libc::IPPROTO_TCP as u32)?,
                    equal(2, libc::TCP_NODELAY as u32)?,
                ],
            )?;
        }
        Room::Log => {}
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

/// `enum bpf_cmd`, include/uapi/linux/bpf.h.
const BPF_MAP_LOOKUP_ELEM: u32 = 1;
/// As above: run times and misses of a program.
const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;
/// As above: a stretch of the walk over the table of sockets.
const BPF_PROG_TEST_RUN: u32 = 10;

/// include/uapi/asm-generic/socket.h (5.1); libc has the older one.
const SO_RCVTIMEO_NEW: u32 = 66;

/// `_IO('$', 1)`, include/uapi/linux/perf_event.h.
const PERF_EVENT_IOC_DISABLE: u32 = 0x2401;

fn own_pid() -> u32 {
    std::process::id()
}

// The arguments looked at are C ints, whose upper half is not defined: the
// lower 32 bits are compared. null() is about a pointer.

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
#[expect(unsafe_code, reason = "forbidden system calls are made raw")]
mod tests {
    use super::*;

    #[test]
    fn every_room_compiles_to_a_program_the_kernel_takes() {
        for room in Room::ALL {
            let program = compile(
                rules(room).unwrap(),
                SeccompAction::Errno(1),
                SeccompAction::Allow,
            )
            .unwrap();
            // BPF_MAXINSNS.
            assert!(program.len() < 4096, "{room}: {}", program.len());
        }
    }

    #[test]
    fn what_must_never_be_allowed() {
        for room in Room::ALL {
            let rules = rules(room).unwrap();
            for call in [
                libc::SYS_execve,
                libc::SYS_execveat,
                libc::SYS_ptrace,
                libc::SYS_process_vm_writev,
                libc::SYS_mount,
                libc::SYS_init_module,
                libc::SYS_finit_module,
                libc::SYS_kexec_load,
                libc::SYS_keyctl,
                libc::SYS_userfaultfd,
                libc::SYS_io_uring_setup,
                libc::SYS_perf_event_open,
                libc::SYS_unlinkat,
                libc::SYS_renameat2,
                libc::SYS_kill,
                libc::SYS_pidfd_getfd,
                libc::SYS_memfd_create,
                libc::SYS_unshare,
            ] {
                assert!(!rules.contains_key(&call), "{room}: {call}");
            }
        }
        for room in [Room::Fold, Room::Serve] {
            assert!(!rules(room).unwrap().contains_key(&libc::SYS_connect));
        }
        assert!(!rules(Room::Serve).unwrap().contains_key(&libc::SYS_socket));
        assert!(!rules(Room::Serve).unwrap().contains_key(&libc::SYS_bpf));
        assert!(!rules(Room::Fold).unwrap().contains_key(&libc::SYS_setns));
    }

    /// Harmless calls that fail with something other than EPERM, or succeed,
    /// for a privileged caller: each must be EPERM once a room is entered.
    const FORBIDDEN: &[(&str, c_long, [c_long; 3])] = &[
        ("execve", libc::SYS_execve, [0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [-1, 0, 0]),
        ("mount", libc::SYS_mount, [0, 0, 0]),
        ("umount2", libc::SYS_umount2, [0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [-1, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [-1, 0, 0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [0, 0, 0]),
        ("unlinkat", libc::SYS_unlinkat, [-1, 0, 0]),
        ("mkdirat", libc::SYS_mkdirat, [-1, 0, 0]),
        ("kill", libc::SYS_kill, [libc::pid_t::MAX as c_long, 0, 0]),
        ("memfd_create", libc::SYS_memfd_create, [0, 0, 0]),
        ("unshare", libc::SYS_unshare, [0, 0, 0]),
        (
            "socket inet",
            libc::SYS_socket,
            [libc::AF_INET as c_long, libc::SOCK_STREAM as c_long, 0],
        ),
        ("connect inet", libc::SYS_connect, [-1, 0, 16]),
        ("connect inet6", libc::SYS_connect, [-1, 0, 28]),
        ("bind", libc::SYS_bind, [-1, 0, 0]),
        ("listen", libc::SYS_listen, [-1, 0, 0]),
        ("sendmsg", libc::SYS_sendmsg, [-1, 0, 0]),
        ("sendmmsg", libc::SYS_sendmmsg, [-1, 0, 0]),
        (
            "setsockopt mark",
            libc::SYS_setsockopt,
            [-1, libc::SOL_SOCKET as c_long, libc::SO_MARK as c_long],
        ),
        (
            "shutdown both",
            libc::SYS_shutdown,
            [-1, libc::SHUT_RDWR as c_long, 0],
        ),
        (
            "signals to another process",
            libc::SYS_fcntl,
            [-1, libc::F_SETOWN as c_long, 1],
        ),
        ("inotify", libc::SYS_inotify_init1, [-1, 0, 0]),
        ("landlock", libc::SYS_landlock_create_ruleset, [0, 0, -1]),
        (
            "mmap exec",
            libc::SYS_mmap,
            [0, 4096, libc::PROT_EXEC as c_long],
        ),
        (
            "fork",
            libc::SYS_clone,
            [libc::CLONE_NEWUSER as c_long, 0, 0],
        ),
        ("bpf prog load", libc::SYS_bpf, [5, 0, 0]),
        (
            "openat to write",
            libc::SYS_openat,
            [-1, 0, libc::O_WRONLY as c_long],
        ),
        (
            "openat to create",
            libc::SYS_openat,
            [-1, 0, libc::O_CREAT as c_long],
        ),
    ];

    fn errno(call: c_long, [a, b, c]: [c_long; 3]) -> i32 {
        // SAFETY: every call of FORBIDDEN is one whose pointer arguments are
        // null or -1 and that fails before it has an effect, filter or not;
        // the table above upholds it (mmap and clone are only made filtered).
        let result = unsafe { libc::syscall(call, a, b, c) };
        if result >= 0 {
            return 0;
        }
        std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
    }

    #[test]
    fn forbidden_calls_get_eperm_in_every_room() {
        for room in Room::ALL {
            std::thread::spawn(move || {
                filter(room).unwrap();
                for &(what, call, arguments) in FORBIDDEN {
                    assert_eq!(errno(call, arguments), libc::EPERM, "{room}: {what}");
                }
                assert_eq!(errno(libc::SYS_clone3, [0, 0, 0]), libc::ENOSYS, "{room}");
                // Only the lookup of a map and the run of a program reach the
                // kernel, each in one room.
                for (command, allowed) in [
                    (BPF_MAP_LOOKUP_ELEM, Room::Fold),
                    (BPF_PROG_TEST_RUN, Room::Walker),
                ] {
                    let errno = errno(libc::SYS_bpf, [command.into(), 0, 0]);
                    assert_eq!(
                        errno == libc::EPERM,
                        room != allowed,
                        "{room}: {command}: {errno}"
                    );
                }
            })
            .join()
            .unwrap();
        }
    }

    #[test]
    fn without_a_filter_the_same_calls_are_not_eperm() {
        if !super::super::held().contains(super::super::CapabilitySet::SYS_ADMIN) {
            println!("not applicable: errno without a filter: needs CAP_SYS_ADMIN");
            return;
        }
        for &(what, call, arguments) in FORBIDDEN {
            if [libc::SYS_mmap, libc::SYS_clone].contains(&call) {
                continue;
            }
            assert_ne!(errno(call, arguments), libc::EPERM, "{what}");
        }
    }
}
