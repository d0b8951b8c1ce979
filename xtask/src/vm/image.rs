//! An initramfs with the agent, its test binary and what they call.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::fetch::Unpacked;
use crate::exec;

/// Programs of the host that the tests call; with their libraries.
const PROGRAMS: [&str; 4] = ["ip", "ss", "tc", "nft"];

/// Modules that the scenarios need, where they are not built in; their
/// dependencies come along.
const MODULES: [&str; 9] = [
    "veth",
    "tcp_diag",
    "inet_diag",
    "sctp",
    "sch_netem",
    "sch_tbf",
    "nf_tables",
    "nft_numgen",
    "mptcp_diag",
];

/// The firmware leaves its last line open, hence the empty one at the end.
const MOUNTS: &str = "\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/sbin:/bin HOME=/ CONNMON_GUEST=1 RUST_BACKTRACE=0
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /run
mount -t tracefs tracefs /sys/kernel/tracing
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ulimit -n 65536
ip link set lo up
";

/// Packs `dir/initrd` and returns its path. `agent` lies at the same path in
/// the guest, where the test binary expects it; `runs` are the arguments of
/// that binary, for one run after the other.
///
/// # Errors
/// When a program, library or module cannot be copied or packed.
pub fn pack(
    dir: &Path,
    kernel: &Unpacked,
    (agent, test): (&Path, &Path),
    rungs: &[String],
    runs: &[String],
) -> Result<PathBuf> {
    let root = dir.join("initramfs");
    let _ = fs::remove_dir_all(&root);
    for part in [
        "sbin",
        "dev",
        "proc",
        "sys",
        "tmp",
        "run",
        "etc",
        "lib/modules",
    ] {
        fs::create_dir_all(root.join(part))?;
    }
    let find = |name: &str| exec::find(name).with_context(|| format!("there is no program {name}"));
    copy(&find("busybox")?, &root, Path::new("/bin/busybox"))?;
    let mut libraries = BTreeSet::new();
    for name in PROGRAMS {
        let path = find(name)?;
        libraries.extend(libraries_of(&path)?);
        copy(&path, &root, &Path::new("/usr/sbin").join(name))?;
    }
    for (from, to) in [(agent, agent), (test, Path::new("/bin/kernel-test"))] {
        libraries.extend(libraries_of(from)?);
        let to = copy(from, &root, to)?;
        // Symbols are three quarters of what the guest would have to unpack.
        exec::run(Command::new("strip").arg(&to))?;
    }
    for library in &libraries {
        copy(library, &root, library)?;
    }
    let mut script = MOUNTS.to_owned();
    if let Some(modules) = &kernel.modules {
        script += &unpack_modules(modules, &root)?;
    }
    script += &format!("export CONNMON_RUNGS={}\necho\n", rungs.join(","));
    for run in runs {
        script +=
            &format!("/bin/kernel-test --format=json {run}\necho \"guest: run ended with $?\"\n");
    }
    script += "echo \"guest: end\"\nreboot -f\n";
    let init = root.join("init");
    fs::write(&init, script)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let initrd = dir.join("initrd");
    exec::run(
        Command::new("sh")
            .current_dir(&root)
            .args(["-c", "find . | cpio --quiet -o -H newc > \"$0\""])
            .arg(&initrd),
    )?;
    fs::remove_dir_all(&root)?;
    Ok(initrd)
}

/// The shared libraries that a program is loaded with, the loader included.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    // Of a static program there are none, which ldd calls a failure.
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot start `ldd`")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = text
        .split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'));
    Ok(paths.map(PathBuf::from).collect())
}

fn copy(from: &Path, root: &Path, to: &Path) -> Result<PathBuf> {
    let to = root.join(to.strip_prefix("/").unwrap_or(to));
    fs::create_dir_all(to.with_file_name(""))?;
    fs::copy(from, &to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(to)
}

/// Unpacks the wanted modules and what they depend on, and returns the
/// commands that load them in order.
fn unpack_modules(modules: &Path, root: &Path) -> Result<String> {
    let release = modules.file_name().unwrap_or_default();
    // The directory that holds lib/modules/RELEASE.
    let base = modules
        .ancestors()
        .nth(3)
        .context("modules lie in lib/modules")?;
    exec::run(Command::new("depmod").arg("-b").arg(base).arg(release))?;
    let mut script = String::new();
    let mut known = BTreeSet::new();
    for name in MODULES {
        let mut command = Command::new("modprobe");
        command.arg("-d").arg(base).arg("-S").arg(release);
        // One that this kernel does not have is found missing by its scenario.
        let output = command.args(["--show-depends", name]).output();
        let output = output.with_context(|| format!("cannot start `{}`", exec::shown(&command)))?;
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            // The other lines are `builtin NAME`.
            let Some(path) = line
                .strip_prefix("insmod ")
                .map(|path| Path::new(path.trim()))
            else {
                continue;
            };
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            let (name, packed) = file.split_once(".ko").context("a module is a .ko file")?;
            if !known.insert(name.to_owned()) {
                continue;
            }
            let unpack = match packed {
                "" => "cat",
                ".xz" => "xz -dc",
                ".zst" => "zstd -dcq",
                _ => bail!("cannot unpack {}", path.display()),
            };
            let to = format!("lib/modules/{name}.ko");
            exec::run(
                Command::new("sh")
                    .args(["-c", &format!("{unpack} \"$0\" > \"$1\"")])
                    .args([path, &root.join(&to)]),
            )?;
            script += &format!("insmod /{to} || echo \"guest: no module {name}\"\n");
        }
    }
    Ok(script)
}
