//! Threads of this test enter the sandbox of each role: what must fail does, and
//! what the agent needs still works.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use connmon_host::sandbox::{CapabilitySet, Measure, Plan, Role, SandboxChoice, held};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A directory of this test, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("connmon-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path.canonicalize().unwrap())
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs `inside` in a thread that may enter a sandbox.
fn in_thread<T: Send>(inside: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(inside).join().unwrap())
}

fn kernel_has_landlock() -> bool {
    // Entering a sandbox shows it: the crate asks the kernel for its ABI.
    in_thread(|| {
        let report = Plan::new(SandboxChoice::Auto, true, true).enter(Role::Serve);
        report.unwrap().in_force.contains(&Measure::Landlock)
    })
}

#[test]
fn serve_reads_its_directories_and_nothing_else() {
    if !kernel_has_landlock() {
        println!("not applicable: paths refused to the serving thread: no Landlock in this kernel");
        return;
    }
    let scratch = Scratch::new("serve-paths");
    let database = scratch.write("geo/country.mmdb", "one");
    let secret = scratch.write("other/secret", "secret");
    let mut plan = Plan::new(SandboxChoice::Strict, true, true);
    plan.also_readable(&database);
    in_thread(|| {
        let report = plan.enter(Role::Serve).unwrap();
        assert_eq!(report.lacks, Vec::<String>::new());
        assert_eq!(std::fs::read_to_string(&database).unwrap(), "one");
        for path in [
            secret.as_path(),
            Path::new("/etc/passwd"),
            Path::new("/proc/1/environ"),
        ] {
            let error = std::fs::read(path).unwrap_err();
            assert_eq!(
                error.kind(),
                ErrorKind::PermissionDenied,
                "{}",
                path.display()
            );
        }
        // What process_* metrics are made from.
        for path in [
            "/proc/self/stat",
            "/proc/self/limits",
            "/proc/self/status",
            "/proc/stat",
        ] {
            assert!(!std::fs::read(path).unwrap().is_empty(), "{path}");
        }
        assert!(std::fs::read_dir("/proc/self/fd").unwrap().count() > 2);
        assert!(std::fs::write(&database, "two").is_err());
        assert!(std::fs::remove_file(&database).is_err());
    });
}

#[test]
fn serve_reloads_after_renames_and_symlink_swaps() {
    let scratch = Scratch::new("serve-reload");
    let renamed = scratch.write("renamed/web.yml", "one");
    // As Kubernetes mounts a ConfigMap: file → ..data/file, ..data → ..1.
    scratch.write("map/..1/web.yml", "one");
    symlink("..1", scratch.0.join("map/..data")).unwrap();
    let mapped = scratch.0.join("map/web.yml");
    symlink("..data/web.yml", &mapped).unwrap();
    // A release directory behind an absolute link.
    scratch.write("releases/1/web.yml", "one");
    symlink(scratch.0.join("releases/1"), scratch.0.join("current")).unwrap();
    let released = scratch.0.join("current/web.yml");

    let mut plan = Plan::new(SandboxChoice::Auto, true, true);
    for file in [&renamed, &mapped, &released] {
        plan.also_readable(file);
    }
    thread::scope(|scope| {
        // Made in here, so that a panic below drops it and the thread ends.
        let (swapped, wait) = std::sync::mpsc::sync_channel(16);
        let (entered, ready) = std::sync::mpsc::sync_channel(16);
        let inside = scope.spawn({
            let (plan, files) = (&plan, [&renamed, &mapped, &released]);
            move || {
                plan.enter(Role::Serve).unwrap();
                entered.send(()).unwrap();
                wait.recv().unwrap();
                files.map(|file| std::fs::read_to_string(file).unwrap())
            }
        });
        ready.recv().unwrap();
        let swap = |target: &Path, link: PathBuf| {
            let new = scratch.0.join("swap");
            symlink(target, &new).unwrap();
            std::fs::rename(new, link).unwrap();
        };
        std::fs::rename(scratch.write("renamed/new", "two"), &renamed).unwrap();
        scratch.write("map/..2/web.yml", "two");
        swap(Path::new("..2"), scratch.0.join("map/..data"));
        scratch.write("releases/2/web.yml", "two");
        swap(&scratch.0.join("releases/2"), scratch.0.join("current"));
        swapped.send(()).unwrap();
        assert_eq!(inside.join().unwrap(), ["two", "two", "two"]);
    });
}

#[test]
fn serve_accepts_but_cannot_connect_or_execute() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let plan = Plan::new(SandboxChoice::Auto, true, true);
    in_thread(|| {
        let report = plan.enter(Role::Serve).unwrap();
        assert!(report.in_force.contains(&Measure::Seccomp));
        assert!(report.in_force.contains(&Measure::NoNewPrivs));
        assert_eq!(held(), CapabilitySet::empty());
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"served").unwrap();
        // A worker thread may start and has the same sandbox.
        let called_out = thread::spawn(move || TcpStream::connect(address))
            .join()
            .unwrap();
        assert_eq!(called_out.unwrap_err().kind(), ErrorKind::PermissionDenied);
        assert!(TcpListener::bind("127.0.0.1:0").is_err());
        let program = Command::new("/bin/true").exec();
        assert_eq!(program.kind(), ErrorKind::PermissionDenied);
        assert!(Command::new("/bin/true").spawn().is_err());
        assert!(aya::sys::is_map_supported(aya::maps::MapType::Array).is_err());
    });
    drop(listener);
    assert_eq!(client.join().unwrap(), "served");
}

#[test]
fn serve_sends_to_its_clients_and_to_nobody_else() {
    let target = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = target.local_addr().unwrap();
    // Shut down, a listener can connect: by Fast Open, which needs no connect().
    let shut_down = || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
        listener
    };
    let fast_open = SendFlags::from_bits_retain(libc::MSG_FASTOPEN as u32);
    let datagrams = UnixDatagram::pair().unwrap();
    let call_out = |listener: &TcpListener| {
        let data = [IoSlice::new(b"x")];
        let mut none = SendAncillaryBuffer::default();
        [
            rustix::net::sendto(listener, b"x", fast_open, &address),
            rustix::net::sendmsg_addr(listener, &address, &data, &mut none, fast_open),
            rustix::net::sendmsg(&datagrams.0, &data, &mut none, SendFlags::empty()),
        ]
    };
    let outside = call_out(&shut_down());
    assert!(!outside.contains(&Err(Errno::PERM)), "{outside:?}");
    assert_eq!(outside[2], Ok(1), "{outside:?}");
    let listener = shut_down();
    in_thread(|| {
        Plan::new(SandboxChoice::Auto, true, true)
            .enter(Role::Serve)
            .unwrap();
        assert_eq!(call_out(&listener), [Err(Errno::PERM); 3]);
        let pair = UnixDatagram::pair().unwrap_err();
        assert_eq!(pair.kind(), ErrorKind::PermissionDenied);
        // What the service manager receives.
        assert_eq!(datagrams.0.send(b"x").unwrap(), 1);
    });
}

#[test]
fn fold_keeps_map_lookups_and_loses_the_rest() {
    let plan = Plan::new(SandboxChoice::Auto, true, true);
    in_thread(|| {
        let report = plan.enter(Role::Fold).unwrap();
        assert!(report.in_force.contains(&Measure::Seccomp));
        assert!(CapabilitySet::BPF.contains(report.kept), "{report:?}");
        assert!(TcpStream::connect("127.0.0.1:9").is_err());
        if report.in_force.contains(&Measure::Landlock) {
            assert!(std::fs::read("/etc/passwd").is_err());
        }
        assert!(!std::fs::read("/proc/self/status").unwrap().is_empty());
    });
}

/// A process in a network namespace of its own.
struct Namespace(Child);

impl Namespace {
    fn new() -> Option<Self> {
        let child = Command::new("unshare")
            .args(["-n", "sh", "-c", "echo ready; exec sleep 60"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = child.ok()?;
        let mut ready = [0; 5];
        let read = child.stdout.as_mut()?.read_exact(&mut ready);
        let this = Self(child);
        read.ok().map(|()| this)
    }

    fn enter(&self) -> std::io::Result<()> {
        let file = std::fs::File::open(format!("/proc/{}/ns/net", self.0.id()))?;
        Ok(move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&file),
            Some(LinkNameSpaceType::Network),
        )?)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn walker_reads_a_namespace_made_after_its_sandbox() {
    let privileged = held().contains(CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_PTRACE);
    if !privileged {
        println!("not applicable: setns by the walker: needs CAP_SYS_ADMIN and CAP_SYS_PTRACE");
        return;
    }
    let plan = Plan::new(SandboxChoice::Strict, true, true);
    thread::scope(|scope| {
        let (namespace_made, wait) = std::sync::mpsc::sync_channel::<Option<Namespace>>(16);
        let (entered, ready) = std::sync::mpsc::sync_channel(16);
        let walker = scope.spawn({
            let plan = &plan;
            move || {
                let report = plan.enter(Role::Walker).unwrap();
                assert!(!report.in_force.contains(&Measure::Landlock));
                assert!(!held().contains(CapabilitySet::NET_ADMIN));
                assert!(!held().contains(CapabilitySet::BPF));
                entered.send(()).unwrap();
                let namespace = wait.recv().unwrap()?;
                namespace.enter().unwrap();
                let tcp = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
                // Owners: another user's descriptors are readable.
                assert!(std::fs::read_dir("/proc/1/fd").is_ok());
                assert!(
                    TcpStream::connect("127.0.0.1:9").unwrap_err().kind()
                        == ErrorKind::PermissionDenied
                );
                assert!(std::fs::write("/tmp/connmon-walker-wrote", "").is_err());
                assert!(Command::new("/bin/true").spawn().is_err());
                Some(tcp)
            }
        });
        ready.recv().unwrap();
        let namespace = Namespace::new();
        let listener = namespace.as_ref().map(|namespace| {
            in_thread(|| {
                namespace.enter().unwrap();
                TcpListener::bind("0.0.0.0:0").unwrap()
            })
        });
        namespace_made.send(namespace).unwrap();
        let tcp = walker.join().unwrap();
        let (Some(tcp), Some(listener)) = (tcp, listener) else {
            println!("skipped: walker in a younger namespace: unshare -n failed");
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"));
            return;
        };
        let port = format!(":{:04X} ", listener.local_addr().unwrap().port());
        assert!(tcp.contains(&port), "{port} not in {tcp}");
    });
}

#[test]
fn without_landlock_strict_fails_and_auto_runs() {
    use seccompiler::{SeccompAction, SeccompFilter};
    // To this thread the kernel has no Landlock.
    let blind = || {
        let program: seccompiler::BpfProgram = SeccompFilter::new(
            [(libc::SYS_landlock_create_ruleset, Vec::new())].into(),
            SeccompAction::Allow,
            SeccompAction::Errno(libc::ENOSYS as u32),
            std::env::consts::ARCH.try_into().unwrap(),
        )
        .unwrap()
        .try_into()
        .unwrap();
        seccompiler::apply_filter(&program).unwrap();
    };
    in_thread(|| {
        blind();
        let plan = Plan::new(SandboxChoice::Strict, true, true);
        let error = plan.enter(Role::Serve).unwrap_err().to_string();
        assert!(error.contains("--sandbox strict: thread serve"), "{error}");
        assert!(error.contains("landlock: not in this kernel"), "{error}");
    });
    in_thread(|| {
        blind();
        let plan = Plan::new(SandboxChoice::Auto, true, true);
        let report = plan.enter(Role::Serve).unwrap();
        assert_eq!(report.lacks.len(), 1, "{report:?}");
        assert!(report.in_force.contains(&Measure::Seccomp));
        assert!(std::fs::read("/etc/passwd").is_ok());
    });
}

#[test]
fn off_changes_nothing() {
    in_thread(|| {
        let before = held();
        let plan = Plan::new(SandboxChoice::Off, true, true);
        for role in [Role::Walker, Role::Fold, Role::Serve, Role::Log, Role::Tool] {
            let report = plan.enter(role).unwrap();
            assert_eq!((report.in_force.len(), report.lacks.len()), (0, 0));
        }
        assert_eq!(held(), before);
        assert!(Command::new("/bin/true").status().unwrap().success());
        assert!(!rustix::thread::no_new_privs().unwrap());
    });
}
