//! Landlock: which directories a thread may read.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};

/// Newest ABI whose rights are asked for; an older kernel enforces those that it
/// knows. `strict` requires ABI 1 (Linux 5.13): what later ones add (truncate,
/// device ioctls, TCP bind and connect) the system call filter refuses itself.
const NEWEST: ABI = ABI::V5;

/// Most symlinks followed in one path, as MAXSYMLINKS (include/linux/namei.h).
const MAX_LINKS: usize = 40;

/// What the agent reads of itself (`process_*` metrics, missed runs of its
/// programs), and where glibc counts CPUs.
const ALWAYS: [&str; 3] = ["/proc/self", "/proc/stat", "/sys/devices/system/cpu"];

/// Leaves the calling thread [`ALWAYS`] and the directories of `files`, read
/// only; no TCP bind or connect.
pub(super) fn restrict(files: &[PathBuf]) -> Result<(), String> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .map_err(|error| error.to_string())?;
    let places = files.iter().flat_map(|file| places(file));
    for place in ALWAYS.iter().map(PathBuf::from).chain(places) {
        let Ok(fd) = PathFd::new(&place) else {
            // Not there, so nothing to allow; reading it reports that.
            continue;
        };
        let access = if place.is_dir() {
            AccessFs::ReadFile | AccessFs::ReadDir
        } else {
            AccessFs::ReadFile.into()
        };
        ruleset = ruleset
            .add_rule(PathBeneath::new(&fd, access))
            .map_err(|error| format!("rule for {}: {error}", place.display()))?;
        // A rule is bound to the inode, and procfs makes a new one for
        // /proc/<pid> unless an open descriptor pins the old one.
        std::mem::forget(fd);
    }
    let status = ruleset.restrict_self().map_err(|error| error.to_string())?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced, _) => Ok(()),
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Err("built into this kernel but not enabled: boot with landlock in lsm=".to_owned())
        }
        (RulesetStatus::NotEnforced, _) => {
            Err("not in this kernel: Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK".to_owned())
        }
    }
}

/// The directories that must stay readable so that `file` can be read again
/// after a rename or a symlink swap: the one that holds it in the end, and for
/// every symlink in its path the one that holds the link and the one that holds
/// its target (`current -> /srv/releases/7` is swapped for a sibling of `7`).
///
/// Never the root directory, which would allow everything: a file right below it
/// is allowed itself, and reloads only when rewritten in place.
fn places(file: &Path) -> BTreeSet<PathBuf> {
    let mut places = BTreeSet::new();
    let Ok(absolute) = std::path::absolute(file) else {
        return places;
    };
    let mut rest: Vec<OsString> = names(&absolute).rev().collect();
    let mut here = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = rest.pop() {
        if name == ".." {
            here.pop();
            continue;
        }
        let path = here.join(&name);
        match std::fs::read_link(&path) {
            Ok(target) if links < MAX_LINKS => {
                links += 1;
                add(&mut places, &here);
                if let Some(parent) = here.join(&target).parent() {
                    add(&mut places, parent);
                }
                if target.is_absolute() {
                    here = PathBuf::from("/");
                }
                rest.extend(names(&target).rev());
            }
            _ => here = path,
        }
    }
    let parent = here.parent().unwrap_or(Path::new("/"));
    if !add(&mut places, parent) && here.is_file() {
        places.insert(here);
    }
    places
}

/// Components without the root and `.`, front to back.
fn names(path: &Path) -> impl DoubleEndedIterator<Item = OsString> + '_ {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

/// Adds a directory unless it is missing or the root.
fn add(places: &mut BTreeSet<PathBuf>, directory: &Path) -> bool {
    match directory.canonicalize() {
        Ok(real) if real != Path::new("/") => {
            places.insert(real);
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn every_directory_a_swap_can_lead_to() {
        let root = std::env::temp_dir().join(format!("connmon-places-{}", std::process::id()));
        let root = {
            std::fs::create_dir_all(&root).unwrap();
            root.canonicalize().unwrap()
        };
        for directory in ["etc/..2024", "srv/releases/7"] {
            std::fs::create_dir_all(root.join(directory)).unwrap();
        }
        std::fs::write(root.join("etc/..2024/geo.mmdb"), b"").unwrap();
        std::fs::write(root.join("srv/releases/7/geo.mmdb"), b"").unwrap();
        // As Kubernetes mounts a ConfigMap.
        symlink("..2024", root.join("etc/..data")).unwrap();
        symlink("..data/geo.mmdb", root.join("etc/geo.mmdb")).unwrap();
        let found = places(&root.join("etc/geo.mmdb"));
        assert!(found.contains(&root.join("etc")), "{found:?}");
        // A release directory swapped through an absolute link.
        symlink(root.join("srv/releases/7"), root.join("srv/current")).unwrap();
        let found = places(&root.join("srv/current/geo.mmdb"));
        assert!(found.contains(&root.join("srv/releases")), "{found:?}");
        // A loop ends.
        symlink("loop", root.join("loop")).unwrap();
        places(&root.join("loop/x"));
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn the_root_directory_is_never_allowed() {
        for file in ["/geo.mmdb", "/proc/self/root/geo.mmdb", "/../x"] {
            assert!(!places(Path::new(file)).contains(Path::new("/")), "{file}");
        }
    }
}
