//! Which network namespaces there are, and ways into each.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use connmon_core::event::NetnsId;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::is_resource_exhausted;

use super::diag::Family;

/// Most namespaces of one walk; what is beyond counts as unaudited. A busy
/// Kubernetes node has a few hundred.
pub const MAX_NAMESPACES: usize = 4096;

/// A way into a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handle {
    /// It is the walker's own.
    Own,
    /// A process in it, or a thread of one whose first thread has ended:
    /// `/proc` leads to both alike.
    Process(u32),
    /// A file that holds it, as `ip netns add` makes them.
    Mount(PathBuf),
}

/// A namespace that was there when the walk looked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Inode, or a surrogate id.
    pub id: NetnsId,
    /// Whether `id` is the inode of its `/proc/<pid>/net/tcp` instead, for
    /// want of the right to read the namespace's own.
    pub surrogate: bool,
    /// Inode of its `/proc/<pid>/net/tcp`, where it is that which tells it
    /// from others because its own may not be read, or not for long.
    pub table: Option<u64>,
    /// Ways in, at most [`MAX_HANDLES`] and a mount: processes come and go,
    /// and all that were seen first may have ended by the time they are used.
    pub handles: Vec<Handle>,
}

impl Namespace {
    /// Whether only names under `/run/netns` and the like lead there.
    pub fn is_mount_only(&self) -> bool {
        let mut handles = self.handles.iter();
        handles.all(|handle| matches!(handle, Handle::Mount(_)))
    }
}

/// What [`Roots::find`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Each once; the walker's own first.
    pub namespaces: Vec<Namespace>,
    /// Namespaces beyond [`MAX_NAMESPACES`].
    pub overflow: u32,
    /// Why some processes' namespaces cannot even be told apart.
    pub hidden: Option<String>,
    /// A directory could not be read for want of resources, so namespaces may
    /// be missing that are there.
    pub short: bool,
}

/// Where to look; a parameter so that tests can bring their own tree.
#[derive(Clone, Debug)]
pub struct Roots {
    /// `/proc`.
    pub proc: PathBuf,
    /// Directories with files that hold namespaces.
    pub mounts: Vec<PathBuf>,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            mounts: ["/run/netns", "/var/run/netns", "/run/docker/netns"]
                .map(PathBuf::from)
                .to_vec(),
        }
    }
}

/// Ways in that are kept per namespace.
pub const MAX_HANDLES: usize = 3;

/// Threads that are looked at when the first one of a process has ended.
pub const MAX_THREADS: usize = 8;

/// Threads that one walk looks at for namespaces in which no process is as a
/// whole: about 2 µs each. The next walk goes on where this one ended.
const MAX_LOOKS: usize = 4096;

/// What is known of namespaces that only a later thread of a process is in.
#[derive(Debug, Default)]
pub struct ThreadSearch {
    /// Process and thread that lead there; at most [`MAX_NAMESPACES`].
    found: HashMap<NetnsId, (u32, u32)>,
    /// Process and thread that the last search ended with; it goes on after
    /// them, and in the end begins anew.
    last: (u32, u32),
}

impl Roots {
    /// The calling process's namespace.
    ///
    /// # Errors
    /// Without a readable `/proc/self/ns/net`.
    pub fn own(&self) -> io::Result<NetnsId> {
        namespace_link(&self.proc.join("self/ns/net"))
    }

    /// The namespace called `host`: pid 1's where that can be read, else the
    /// agent's own, which it usually is. The log says so where it is not, or
    /// where nothing tells.
    ///
    /// # Errors
    /// Without a readable `/proc/self/ns/net`.
    pub fn host(&self) -> io::Result<NetnsId> {
        let first = self.process(1).join("ns/net");
        let error = match namespace_link(&first) {
            Ok(host) => return Ok(host),
            Err(error) => error,
        };
        let table = |handle: Handle| self.table(&handle, Family::V4).and_then(inode);
        let firsts = table(Handle::Process(1));
        if firsts.is_none() || firsts != table(Handle::Own) {
            log::warn!(
                "{}: {error}; the agent's own network namespace is taken for the host's",
                first.display(),
            );
        }
        self.own()
    }

    /// The host's namespace, to be asked for before the right to read it is
    /// given up: its table can still be read, and told from others, after.
    ///
    /// # Errors
    /// Without a readable `/proc/self/ns/net`.
    pub fn host_namespace(&self) -> io::Result<Namespace> {
        let (own, host) = (self.own()?, self.host()?);
        let handle = if own == host {
            Handle::Own
        } else {
            Handle::Process(1)
        };
        Ok(Namespace {
            id: host,
            surrogate: false,
            table: self.table(&handle, Family::V4).and_then(inode),
            handles: vec![handle],
        })
    }

    /// Every namespace some process is in or some mount holds. Processes
    /// that end meanwhile are nothing special. `home` is the way back from
    /// namespaces that only entering tells apart, see [`within`]. Threads that
    /// went elsewhere are looked for where `search` says so, and remembered.
    ///
    /// # Errors
    /// Without a readable `/proc`.
    pub fn find(&self, home: &File, threads: &mut ThreadSearch, search: bool) -> io::Result<Found> {
        let mut finder = Finder::default();
        finder.note(self.own()?, false, Handle::Own);
        let mut unreadable = Vec::new();
        let pids = self.pids()?;
        for &pid in &pids {
            match self.living(pid, |task| namespace_link(&task.join("ns/net"))) {
                Ok((task, id)) => finder.note(id, false, Handle::Process(task)),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    unreadable.push(pid);
                }
                Err(_) => {}
            }
        }
        for directory in &self.mounts {
            let entries = match fs::read_dir(directory) {
                Ok(entries) => entries,
                Err(error) => {
                    finder.found.short |= is_resource_exhausted(&error);
                    continue;
                }
            };
            // A mount point whose namespace is gone is an empty file of
            // another file system.
            for path in entries.flatten().map(|entry| entry.path()) {
                if let Some(id) = namespace_file(&path) {
                    finder.note(id, false, Handle::Mount(path));
                }
            }
        }
        self.note_threads(threads, &mut finder);
        if search {
            unreadable.extend(self.search_threads(&pids, threads, &mut finder));
        }
        if !unreadable.is_empty() {
            self.note_unreadable(&unreadable, home, &mut finder);
        }
        Ok(finder.found)
    }

    /// Notes what earlier searches have found and is still there.
    fn note_threads(&self, threads: &mut ThreadSearch, finder: &mut Finder) {
        threads.found.retain(|&id, &mut (pid, tid)| {
            let stays = namespace_link(&self.thread(pid, tid).join("ns/net")).ok() == Some(id);
            if stays {
                finder.note(id, false, Handle::Process(tid));
            }
            stays
        });
    }

    /// Looks at the next threads that are not the first of their process.
    /// Gives those whose namespace may not be read.
    fn search_threads(
        &self,
        pids: &[u32],
        threads: &mut ThreadSearch,
        finder: &mut Finder,
    ) -> Vec<u32> {
        let mut unreadable = Vec::new();
        let mut looks = MAX_LOOKS;
        let last = threads.last;
        let from = pids.partition_point(|&pid| pid < last.0);
        for &pid in &pids[from..] {
            for tid in self.later_threads(pid) {
                if (pid, tid) <= last {
                    continue;
                }
                if looks == 0 {
                    return unreadable;
                }
                looks -= 1;
                threads.last = (pid, tid);
                match namespace_link(&self.thread(pid, tid).join("ns/net")) {
                    Ok(id) if finder.places.contains_key(&(id, false)) => {}
                    Ok(id) => {
                        finder.note(id, false, Handle::Process(tid));
                        if threads.found.len() < MAX_NAMESPACES {
                            threads.found.insert(id, (pid, tid));
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                        unreadable.push(tid);
                    }
                    Err(_) => {}
                }
            }
        }
        threads.last = (0, 0);
        unreadable
    }

    /// The threads of a process but the first, ascending.
    pub fn later_threads(&self, pid: u32) -> Vec<u32> {
        let tasks = self.process(pid).join("task");
        // 2 and the number of threads (`proc_task_getattr`): most processes
        // have one, and reading a directory costs more.
        if fs::metadata(&tasks).is_ok_and(|tasks| tasks.nlink() == 3) {
            return Vec::new();
        }
        let mut threads: Vec<u32> = fs::read_dir(tasks)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|&tid| tid != pid)
            .collect();
        threads.sort_unstable();
        threads
    }

    /// Tells the namespaces of processes we may not look into apart by the
    /// inode of `/proc/<pid>/net/tcp`, which needs no right at all: it
    /// belongs to the namespace (`proc_net` entries are per `struct net`).
    fn note_unreadable(&self, pids: &[u32], home: &File, finder: &mut Finder) {
        let namespaces = &finder.found.namespaces;
        let known: HashSet<u64> = namespaces
            .iter()
            .filter_map(|namespace| self.table_inode(namespace, home))
            .collect();
        for &pid in pids {
            let table = |process: &Path| process.join("net").join(Family::V4.proc_file());
            match self.living(pid, |task| Ok(fs::metadata(table(task))?.ino())) {
                Ok((task, inode)) => {
                    if !known.contains(&inode) {
                        finder.note(surrogate(inode), true, Handle::Process(task));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    finder.found.hidden.get_or_insert_with(|| {
                        format!(
                            "{}: {error}; CAP_SYS_PTRACE lets it be read",
                            table(&self.process(pid)).display()
                        )
                    });
                }
                Err(_) => {}
            }
        }
    }

    /// The inode of a namespace's table by the first way that leads to it.
    fn table_inode(&self, namespace: &Namespace, home: &File) -> Option<u64> {
        namespace.handles.iter().find_map(|handle| {
            if let Some(path) = self.table(handle, Family::V4) {
                return inode(path);
            }
            // Nothing shows a mounted namespace's table from outside.
            let there = self.open(namespace, handle).ok()?;
            within(&there, home, || inode(self.own_table(Family::V4))).ok()?
        })
    }

    /// What `look` finds in the directory of a process, or of another of its
    /// threads: a first thread that ended before the others is in no
    /// namespace any more. With the id that leads there.
    fn living<T>(&self, pid: u32, look: impl Fn(&Path) -> io::Result<T>) -> io::Result<(u32, T)> {
        let gone = match look(&self.process(pid)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => error,
            result => return result.map(|found| (pid, found)),
        };
        self.later_threads(pid)
            .into_iter()
            .take(MAX_THREADS)
            .map(|tid| look(&self.thread(pid, tid)).map(|found| (tid, found)))
            .find(|result| !matches!(result, Err(error) if error.kind() == io::ErrorKind::NotFound))
            .unwrap_or(Err(gone))
    }

    /// The path of a namespace's table as seen through a handle.
    pub fn table(&self, handle: &Handle, family: Family) -> Option<PathBuf> {
        let process = match handle {
            Handle::Own => self.proc.join("self"),
            Handle::Process(pid) => self.process(*pid),
            Handle::Mount(_) => return None,
        };
        Some(process.join("net").join(family.proc_file()))
    }

    /// Opens the file that setns(2) wants, making sure that it still is
    /// this namespace's: a pid may have been reused.
    ///
    /// # Errors
    /// NotFound when it is gone, PermissionDenied without CAP_SYS_PTRACE.
    pub fn open(&self, namespace: &Namespace, handle: &Handle) -> io::Result<File> {
        let file = File::open(match handle {
            Handle::Own => self.proc.join("self/ns/net"),
            Handle::Process(pid) => self.process(*pid).join("ns/net"),
            Handle::Mount(path) => path.clone(),
        })?;
        if file.metadata()?.ino() != u64::from(namespace.id) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(file)
    }

    /// Opens a namespace's table through a process, making sure that it is
    /// still that namespace's. `Ok(None)`: the kernel has no such table (IPv6
    /// is compiled out or off).
    ///
    /// # Errors
    /// NotFound when the process or its namespace is gone.
    pub fn open_table(
        &self,
        namespace: &Namespace,
        handle: &Handle,
        family: Family,
    ) -> io::Result<Option<File>> {
        let path = self.table(handle, family).ok_or(io::ErrorKind::NotFound)?;
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound && family == Family::V6 => {
                // No table, or no process?
                let v4 = self
                    .table(handle, Family::V4)
                    .ok_or(io::ErrorKind::NotFound)?;
                fs::metadata(v4)?;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let same = match (handle, namespace.table) {
            (Handle::Own | Handle::Mount(_), _) => true,
            (Handle::Process(pid), None) => {
                namespace_link(&self.process(*pid).join("ns/net"))? == namespace.id
            }
            (Handle::Process(_), Some(inode)) => {
                let v4 = self
                    .table(handle, Family::V4)
                    .ok_or(io::ErrorKind::NotFound)?;
                fs::metadata(v4)?.ino() == inode
            }
        };
        if same {
            Ok(Some(file))
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// Opens a table of the calling thread's namespace, which need not be
    /// that of its process.
    ///
    /// # Errors
    /// Without a readable `/proc`.
    pub fn open_own_table(&self, family: Family) -> io::Result<Option<File>> {
        match File::open(self.own_table(family)) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && family == Family::V6 => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn own_table(&self, family: Family) -> PathBuf {
        self.proc.join("thread-self/net").join(family.proc_file())
    }

    /// Processes, ascending.
    ///
    /// # Errors
    /// Without a readable `/proc`.
    pub fn pids(&self) -> io::Result<Vec<u32>> {
        let mut pids: Vec<u32> = fs::read_dir(&self.proc)?
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        pids.sort_unstable();
        Ok(pids)
    }

    /// `/proc/<pid>`.
    pub fn process(&self, pid: u32) -> PathBuf {
        self.proc.join(pid.to_string())
    }

    /// `/proc/<pid>/task/<tid>`.
    pub fn thread(&self, pid: u32, tid: u32) -> PathBuf {
        self.process(pid).join("task").join(tid.to_string())
    }
}

/// Runs `inside` with the calling thread in the namespace of `there`, then
/// brings the thread back to `home`.
///
/// Only for a thread that does nothing else: everything it opens meanwhile
/// belongs to the other namespace.
///
/// # Errors
/// PermissionDenied without CAP_SYS_ADMIN over both namespaces.
///
/// # Panics
/// When there is no way back: such a thread must not live on.
pub fn within<T>(there: &File, home: &File, inside: impl FnOnce() -> T) -> io::Result<T> {
    let network = Some(LinkNameSpaceType::Network);
    move_into_link_name_space(there.as_fd(), network)?;
    let result = inside();
    if let Err(error) = move_into_link_name_space(home.as_fd(), network) {
        panic!("cannot return to the agent's own network namespace: {error}");
    }
    Ok(result)
}

/// `net.ipv4.ip_local_port_range` of the calling thread's namespace; the
/// kernel's default where it cannot be read.
pub fn ephemeral_ports() -> (u16, u16) {
    fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|text| parse_port_range(&text))
        .unwrap_or(DEFAULT_EPHEMERAL)
}

/// `inet_init_net` (net/ipv4/af_inet.c).
pub const DEFAULT_EPHEMERAL: (u16, u16) = (32768, 60999);

fn parse_port_range(text: &str) -> Option<(u16, u16)> {
    let mut words = text.split_ascii_whitespace();
    let (low, high) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    (low <= high).then_some((low, high))
}

#[derive(Default)]
struct Finder {
    found: Found,
    places: HashMap<(NetnsId, bool), Option<usize>>,
}

impl Finder {
    fn note(&mut self, id: NetnsId, surrogate: bool, handle: Handle) {
        let namespaces = &mut self.found.namespaces;
        match self.places.get(&(id, surrogate)) {
            Some(Some(place)) => {
                let handles = &mut namespaces[*place].handles;
                let is_mount = |handle: &Handle| matches!(handle, Handle::Mount(_));
                let first_mount = is_mount(&handle) && !handles.iter().any(is_mount);
                if handles.len() < MAX_HANDLES || first_mount {
                    handles.push(handle);
                }
            }
            Some(None) => {}
            None if namespaces.len() < MAX_NAMESPACES => {
                self.places.insert((id, surrogate), Some(namespaces.len()));
                namespaces.push(Namespace {
                    id,
                    surrogate,
                    table: surrogate.then_some(id.into()),
                    handles: vec![handle],
                });
            }
            None if self.places.len() < 4 * MAX_NAMESPACES => {
                self.places.insert((id, surrogate), None);
                self.found.overflow += 1;
            }
            // Beyond any sense; no longer told apart.
            None => {}
        }
    }
}

/// Inodes of /proc come from the same 32-bit range as namespaces' own
/// (`proc_alloc_inum`), so they are distinct.
fn surrogate(inode: u64) -> NetnsId {
    inode as NetnsId
}

fn inode(path: PathBuf) -> Option<u64> {
    fs::metadata(path).ok().map(|file| file.ino())
}

/// The inode in a link such as `net:[4026531840]`.
fn namespace_link(path: &Path) -> io::Result<NetnsId> {
    let link = fs::read_link(path)?;
    parse_link(link.as_os_str().as_encoded_bytes())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a namespace link"))
}

fn parse_link(link: &[u8]) -> Option<NetnsId> {
    let inode = link.strip_prefix(b"net:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(inode).ok()?.parse().ok()
}

/// The inode of a file that holds a network namespace.
fn namespace_file(path: &Path) -> Option<NetnsId> {
    // Not opened before it is known to be of nsfs: it could be a FIFO.
    let status = rustix::fs::statfs(path).ok()?;
    if status.f_type as u32 != NSFS_MAGIC {
        return None;
    }
    // Other kinds of namespaces can be mounted, too; setns refuses them.
    u32::try_from(fs::metadata(path).ok()?.ino()).ok()
}

/// include/uapi/linux/magic.h
const NSFS_MAGIC: u32 = 0x6e73_6673;

#[cfg(test)]
mod tests;
