#![expect(unsafe_code, reason = "forbidden system calls are made raw")]

use super::*;

const ROLES: [Role; 4] = [Role::Walker, Role::Fold, Role::Serve, Role::Log];

#[test]
fn every_role_compiles_to_a_program_the_kernel_takes() {
    for role in ROLES {
        let program = compile(
            rules(role).unwrap(),
            SeccompAction::Errno(1),
            SeccompAction::Allow,
        )
        .unwrap();
        // BPF_MAXINSNS.
        assert!(program.len() < 4096, "{role}: {}", program.len());
    }
}

#[test]
fn what_must_never_be_allowed() {
    for role in ROLES {
        let rules = rules(role).unwrap();
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
            assert!(!rules.contains_key(&call), "{role}: {call}");
        }
    }
    for role in [Role::Fold, Role::Serve] {
        assert!(!rules(role).unwrap().contains_key(&libc::SYS_connect));
    }
    assert!(!rules(Role::Serve).unwrap().contains_key(&libc::SYS_socket));
    assert!(!rules(Role::Serve).unwrap().contains_key(&libc::SYS_bpf));
    assert!(!rules(Role::Fold).unwrap().contains_key(&libc::SYS_setns));
}

/// Harmless calls that fail with something other than EPERM, or succeed, for a
/// privileged caller: each must be EPERM in every sandbox.
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
fn forbidden_calls_get_eperm_in_every_role() {
    for role in ROLES {
        std::thread::spawn(move || {
            filter(role).unwrap();
            for &(what, call, arguments) in FORBIDDEN {
                assert_eq!(errno(call, arguments), libc::EPERM, "{role}: {what}");
            }
            assert_eq!(errno(libc::SYS_clone3, [0, 0, 0]), libc::ENOSYS, "{role}");
            // Only the lookup of a map and the run of a program reach the
            // kernel, each in one role.
            for (command, allowed) in [
                (BPF_MAP_LOOKUP_ELEM, Role::Fold),
                (BPF_PROG_TEST_RUN, Role::Walker),
            ] {
                let errno = errno(libc::SYS_bpf, [command.into(), 0, 0]);
                assert_eq!(
                    errno == libc::EPERM,
                    role != allowed,
                    "{role}: {command}: {errno}"
                );
            }
        })
        .join()
        .unwrap();
    }
}

#[test]
fn without_a_filter_the_same_calls_are_not_eperm() {
    if !crate::sandbox::held().contains(crate::sandbox::CapabilitySet::SYS_ADMIN) {
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
