//! An initramfs with the agent, its test binary and what they call.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::fetch::{Unpacked, find};
use crate::exec;

/// Programs of the host that the tests call; with their libraries.
const PROGRAMS: [&str; 4] = ["ip", "ss", "tc", "nft"];

/// Modules the scenarios need, where they are not built in; their
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

/// What a guest runs.
#[derive(Debug)]
pub struct Payload {
    /// The agent; lies at the same path in the guest, where tests expect it.
    pub agent: PathBuf,
    /// The test binary.
    pub test: PathBuf,
    /// Its runs: rung, and what the names of its scenarios contain.
    pub runs: Vec<(String, Option<String>)>,
}

impl Payload {
    /// The same binaries with other runs.
    pub fn with(&self, runs: Vec<(String, Option<String>)>) -> Self {
        Self {
            agent: self.agent.clone(),
            test: self.test.clone(),
            runs,
        }
    }
}

/// Packs `dir/initrd` and returns its path.
///
/// # Errors
/// When a program, library or module cannot be copied or packed.
pub fn pack(dir: &Path, kernel: &Unpacked, payload: &Payload) -> Result<PathBuf> {
    let root = dir.join("initramfs");
    let _ = fs::remove_dir_all(&root);
    for part in [
        "bin",
        "sbin",
        "dev",
        "proc",
        "sys",
        "tmp",
        "run",
        "etc",
        "lib/modules",
        "usr/sbin",
    ] {
        fs::create_dir_all(root.join(part))?;
    }
    copy(&program("busybox")?, &root, Path::new("/bin/busybox"))?;
    let mut libraries = BTreeSet::new();
    for name in PROGRAMS {
        let path = program(name)?;
        libraries.extend(needed(&path)?);
        copy(&path, &root, &Path::new("/usr/sbin").join(name))?;
    }
    let test = Path::new("/bin/kernel-test");
    for (from, to) in [
        (&payload.agent, payload.agent.as_path()),
        (&payload.test, test),
    ] {
        libraries.extend(needed(from)?);
        let to = copy(from, &root, to)?;
        // Symbols are three quarters of what the guest would have to unpack.
        exec::run(Command::new("strip").arg(&to))?;
    }
    for library in &libraries {
        copy(library, &root, library)?;
    }
    let modules = match &kernel.modules {
        Some(all) => unpack_modules(all, &root)?,
        None => Vec::new(),
    };
    let init = root.join("init");
    fs::write(&init, init_script(&modules, payload))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;

    let initrd = dir.join("initrd");
    let mut command = Command::new("sh");
    command
        .current_dir(&root)
        .arg("-c")
        .arg("find . | cpio --quiet -o -H newc > \"$1\"")
        .arg("sh")
        .arg(&initrd);
    exec::run(&mut command)?;
    fs::remove_dir_all(&root)?;
    Ok(initrd)
}

fn init_script(modules: &[String], payload: &Payload) -> String {
    let mut script = String::from(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/usr/sbin:/sbin:/bin HOME=/ CONNMON_GUEST=1 RUST_BACKTRACE=0\n\
         mount -t proc proc /proc\nmount -t sysfs sysfs /sys\nmount -t devtmpfs dev /dev\n\
         mount -t tmpfs tmpfs /run\n\
         mount -t tracefs tracefs /sys/kernel/tracing\n\
         mount -t cgroup2 cgroup2 /sys/fs/cgroup\n\
         ulimit -n 65536\nip link set lo up\n",
    );
    for module in modules {
        script +=
            &format!("insmod /lib/modules/{module}.ko || echo \"guest: no module {module}\"\n");
    }
    // The firmware leaves its last line open.
    script += "echo\n";
    for (rung, scenario) in &payload.runs {
        let only = scenario
            .as_ref()
            .map(|scenario| format!(" --scenario '{scenario}'"))
            .unwrap_or_default();
        script +=
            &format!("/bin/kernel-test --rung {rung}{only}\necho \"guest: rung {rung} exit $?\"\n");
    }
    script + "echo \"guest: end\"\nreboot -f\n"
}

/// Finds a program as the shell would, sbin included.
fn program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("there is no program {name}"))
}

/// The shared libraries a program is loaded with, the loader included.
fn needed(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot start `ldd`")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text
        .split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(PathBuf::from)
        .collect())
}

fn copy(from: &Path, root: &Path, to: &Path) -> Result<PathBuf> {
    let to = root.join(to.strip_prefix("/").unwrap_or(to));
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, &to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(to)
}

/// Unpacks the wanted modules and what they depend on; their names in the
/// order in which they load.
fn unpack_modules(all: &Path, root: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    find(all, &mut |path| files.push(path.to_owned()))?;
    let mut order = Vec::new();
    for name in MODULES {
        unpack_module(name, &files, root, &mut order)?;
    }
    Ok(order)
}

fn unpack_module(
    name: &str,
    files: &[PathBuf],
    root: &Path,
    order: &mut Vec<String>,
) -> Result<()> {
    if order.iter().any(|known| known == name) {
        return Ok(());
    }
    let file = files.iter().find_map(|path| {
        let stem = path.file_name()?.to_str()?;
        let (stem, extension) = stem.split_once(".ko")?;
        (stem.replace('-', "_") == name).then_some((path, extension))
    });
    // Built in, or this kernel does not have it.
    let Some((path, extension)) = file else {
        return Ok(());
    };
    let bytes = match extension {
        "" => fs::read(path)?,
        ".xz" => filtered("xz", path)?,
        ".zst" => filtered("zstd", path)?,
        _ => bail!("cannot unpack {}", path.display()),
    };
    for dependency in dependencies(&bytes) {
        unpack_module(&dependency, files, root, order)?;
    }
    fs::write(root.join("lib/modules").join(format!("{name}.ko")), bytes)?;
    order.push(name.to_owned());
    Ok(())
}

fn filtered(program: &str, path: &Path) -> Result<Vec<u8>> {
    let output = Command::new(program)
        .arg("-dc")
        .arg(path)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{program}`"))?;
    if !output.status.success() {
        bail!(
            "`{program} -dc {}` failed: {}",
            path.display(),
            output.status
        );
    }
    Ok(output.stdout)
}

/// `depends=` of a module's `.modinfo`.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|bytes| bytes == KEY) else {
        return Vec::new();
    };
    let value = &module[at + KEY.len()..];
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_modules_dependencies_are_read_from_it() {
        let module = b"..license=GPL\0depends=inet_diag,libcrc32c\0name=x\0";
        assert_eq!(dependencies(module), ["inet_diag", "libcrc32c"]);
        assert!(dependencies(b"license=GPL\0depends=\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }
}
