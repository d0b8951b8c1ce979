//! Lists the network namespaces, and enters them.
//!
//! They are found through processes, through threads that moved elsewhere, and
//! through files that hold a namespace. Where the inode of a namespace may not
//! be read, the inode of its `/proc/<pid>/net/tcp` identifies it: a surrogate
//! id.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use connmon_core::event::NetnsId;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::procfs::Family;
use crate::is_resource_exhausted;

/// Most namespaces of one walk; what is beyond counts as unaudited. A busy
/// Kubernetes node has a few hundred.
pub const MAX_NAMESPACES: usize = 4096;

/// Most processes kept per namespace. All of them may end before they are used.
const MAX_HANDLES: usize = 3;

/// Most threads looked at when the first one of a process has ended.
pub const MAX_THREADS: usize = 8;

/// Most threads that one walk looks at for namespaces in which no process is as
/// a whole, about 2 µs each. The next walk continues where this one ended.
const MAX_LOOKS: usize = 4096;

/// A way into a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handle {
    /// It is the walker's own.
    Own,
    /// A process or a thread in it: `/proc` has both.
    Process(u32),
    /// A file that holds it, as `ip netns add` makes them.
    Mount(PathBuf),
}

/// A namespace that was there when the walk looked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its inode, or a surrogate id.
    pub id: NetnsId,
    /// Whether `id` is a surrogate id.
    pub surrogate: bool,
    /// Inode of its `/proc/<pid>/net/tcp`, by which to recognize it where its
    /// own inode cannot be read, or not for long.
    pub table: Option<u64>,
    /// Ways in: at most `MAX_HANDLES` and a mount.
    pub handles: Vec<Handle>,
}

impl Namespace {
    /// Whether only files under `/run/netns` and the like lead there.
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
    /// Why the namespace of some process could not be identified at all.
    pub hidden: Option<String>,
    /// A directory could not be read for lack of descriptors or memory, so
    /// namespaces may be missing.
    pub incomplete: bool,
}

/// Where to look; tests have trees of their own.
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

/// Namespaces that only a later thread of a process is in, from walk to walk.
#[derive(Debug, Default)]
pub struct ThreadSearch {
    /// Process and thread that lead there; at most [`MAX_NAMESPACES`].
    found: HashMap<NetnsId, (u32, u32)>,
    /// Process and thread that the last search ended with; (0, 0) once all were
    /// looked at.
    last: (u32, u32),
}

impl Roots {
    /// The calling process's namespace.
    ///
    /// # Errors
    /// Without a readable `/proc/self/ns/net`.
    pub fn own(&self) -> io::Result<NetnsId> {
        link_inode(&self.proc.join("self/ns/net"), "net")
    }

    /// The namespace called `host`: pid 1's where it can be read, else the
    /// agent's own, which it usually is. Warns where it may not be.
    ///
    /// # Errors
    /// Without a readable `/proc/self/ns/net`.
    pub fn host(&self) -> io::Result<NetnsId> {
        let link = self.process(1).join("ns/net");
        let error = match link_inode(&link, "net") {
            Ok(host) => return Ok(host),
            Err(error) => error,
        };
        let first = table_inode(&self.process(1).join("net")).ok();
        if first.is_none() || first != table_inode(&self.proc.join("self/net")).ok() {
            log::warn!(
                "{}: {error}; the agent's own network namespace is taken for the host's",
                link.display(),
            );
        }
        self.own()
    }

    /// The host's namespace, to be asked for before the sandbox: its table can
    /// be read and recognized after that too, its inode cannot.
    ///
    /// # Errors
    /// Without a readable `/proc/self/ns/net`.
    pub fn host_namespace(&self) -> io::Result<Namespace> {
        let id = self.host()?;
        let (handle, process) = match id == self.own()? {
            true => (Handle::Own, self.proc.join("self")),
            false => (Handle::Process(1), self.process(1)),
        };
        Ok(Namespace {
            id,
            surrogate: false,
            table: table_inode(&process.join("net")).ok(),
            handles: vec![handle],
        })
    }

    /// Every namespace that a process is in or a file holds. `home` is the
    /// caller's own, see [`within`]. With `search`, threads that moved to
    /// another namespace are looked for, and remembered.
    ///
    /// # Errors
    /// Without a readable `/proc`.
    pub fn find(&self, home: &File, threads: &mut ThreadSearch, search: bool) -> io::Result<Found> {
        let mut finder = Finder::default();
        finder.note(self.own()?, false, Handle::Own);
        let mut unreadable = Vec::new();
        let pids = self.pids()?;
        for &pid in &pids {
            match self.living(pid, |task| link_inode(&task.join("ns/net"), "net")) {
                Ok((task, id)) => finder.note(id, false, Handle::Process(task)),
                Err(error) if error.kind() == ErrorKind::PermissionDenied => unreadable.push(pid),
                // It ended.
                Err(_) => {}
            }
        }
        for directory in &self.mounts {
            match fs::read_dir(directory) {
                Ok(entries) => {
                    for path in entries.flatten().map(|entry| entry.path()) {
                        if let Some(id) = namespace_file(&path) {
                            finder.note(id, false, Handle::Mount(path));
                        }
                    }
                }
                Err(error) => finder.found.incomplete |= is_resource_exhausted(&error),
            }
        }
        threads.found.retain(|&id, &mut (pid, tid)| {
            let stays = link_inode(&self.thread(pid, tid).join("ns/net"), "net").ok() == Some(id);
            if stays {
                finder.note(id, false, Handle::Process(tid));
            }
            stays
        });
        if search {
            self.search_threads(&pids, threads, &mut finder, &mut unreadable);
        }
        if !unreadable.is_empty() {
            self.note_unreadable(&unreadable, home, &mut finder);
        }
        Ok(finder.found)
    }

    /// Looks at the next threads that are not the first of their process. Those
    /// whose namespace may not be read are added to `unreadable`.
    fn search_threads(
        &self,
        pids: &[u32],
        threads: &mut ThreadSearch,
        finder: &mut Finder,
        unreadable: &mut Vec<u32>,
    ) {
        let last = threads.last;
        let from = pids.partition_point(|&pid| pid < last.0);
        let later = pids[from..].iter().flat_map(|&pid| {
            let tids = self.later_threads(pid).into_iter();
            tids.map(move |tid| (pid, tid))
        });
        let later = later.filter(|thread| *thread > last);
        for (looks, (pid, tid)) in later.enumerate() {
            if looks == MAX_LOOKS {
                return;
            }
            threads.last = (pid, tid);
            match link_inode(&self.thread(pid, tid).join("ns/net"), "net") {
                Ok(id) if finder.places.contains_key(&(id, false)) => {}
                Ok(id) => {
                    finder.note(id, false, Handle::Process(tid));
                    if threads.found.len() < MAX_NAMESPACES {
                        threads.found.insert(id, (pid, tid));
                    }
                }
                Err(error) if error.kind() == ErrorKind::PermissionDenied => unreadable.push(tid),
                Err(_) => {}
            }
        }
        threads.last = (0, 0);
    }

    /// The threads of a process but the first, ascending.
    pub fn later_threads(&self, pid: u32) -> Vec<u32> {
        let tasks = self.process(pid).join("task");
        // Its links are 2 and the number of threads (`proc_task_getattr`): most
        // processes have one, and reading a directory costs more.
        if fs::metadata(&tasks).is_ok_and(|tasks| tasks.nlink() == 3) {
            return Vec::new();
        }
        let mut threads = numbers_in(&tasks).unwrap_or_default();
        threads.retain(|&tid| tid != pid);
        threads
    }

    /// Identifies the namespaces of processes whose link may not be read by the
    /// inode of `/proc/<pid>/net/tcp`, which needs no privilege: there is one
    /// per namespace (`proc_net` entries are per `struct net`).
    fn note_unreadable(&self, pids: &[u32], home: &File, finder: &mut Finder) {
        let table_of = |namespace: &Namespace| {
            let mut handles = namespace.handles.iter();
            handles.find_map(|handle| self.in_net(namespace, handle, home, table_inode).ok())
        };
        let known: HashSet<u64> = finder
            .found
            .namespaces
            .iter()
            .filter_map(table_of)
            .collect();
        for &pid in pids {
            match self.living(pid, |task| table_inode(&task.join("net"))) {
                Ok((_, inode)) if known.contains(&inode) => {}
                // Inodes of /proc are of the same 32 bits as those of
                // namespaces (`proc_alloc_inum`), so the two never collide.
                Ok((task, inode)) => finder.note(inode as NetnsId, true, Handle::Process(task)),
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                    finder.found.hidden.get_or_insert_with(|| {
                        let table = self.process(pid).join("net/tcp");
                        format!("{}: {error}; CAP_SYS_PTRACE is needed", table.display())
                    });
                }
                Err(_) => {}
            }
        }
    }

    /// What `look` finds in the directory of a process, or of another of its
    /// threads: a first thread that ended before the others is in no namespace
    /// any more. With the id that leads there.
    fn living<T>(&self, pid: u32, look: impl Fn(&Path) -> io::Result<T>) -> io::Result<(u32, T)> {
        let gone = match look(&self.process(pid)) {
            Err(error) if error.kind() == ErrorKind::NotFound => error,
            result => return result.map(|found| (pid, found)),
        };
        self.later_threads(pid)
            .into_iter()
            .take(MAX_THREADS)
            .map(|tid| look(&self.thread(pid, tid)).map(|found| (tid, found)))
            .find(|result| !matches!(result, Err(error) if error.kind() == ErrorKind::NotFound))
            .unwrap_or(Err(gone))
    }

    /// Opens the file that setns(2) takes, and makes sure that it still is this
    /// namespace's: a pid may have been reused.
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
            return Err(ErrorKind::NotFound.into());
        }
        Ok(file)
    }

    /// Opens a table of a namespace, and makes sure that it still is that
    /// namespace's. `None`: the kernel has no IPv6.
    ///
    /// # Errors
    /// NotFound when the process or its namespace is gone.
    pub fn open_table(
        &self,
        namespace: &Namespace,
        handle: &Handle,
        family: Family,
        home: &File,
    ) -> io::Result<Option<File>> {
        let table = self.in_net(namespace, handle, home, |net| {
            match File::open(net.join(family.file())) {
                Err(error) if error.kind() == ErrorKind::NotFound && family == Family::V6 => {
                    // No table, or no process?
                    table_inode(net).map(|_| None)
                }
                result => result.map(Some),
            }
        })?;
        let is_same = match (handle, namespace.table) {
            (Handle::Own | Handle::Mount(_), _) => true,
            (Handle::Process(pid), None) => {
                link_inode(&self.process(*pid).join("ns/net"), "net")? == namespace.id
            }
            (Handle::Process(pid), Some(inode)) => {
                table_inode(&self.process(*pid).join("net"))? == inode
            }
        };
        match is_same {
            true => Ok(table),
            false => Err(ErrorKind::NotFound.into()),
        }
    }

    /// What `look` finds in the directory of `/proc` with the tables of a
    /// namespace. Only entering a mounted one shows them.
    fn in_net<T>(
        &self,
        namespace: &Namespace,
        handle: &Handle,
        home: &File,
        look: impl FnOnce(&Path) -> io::Result<T>,
    ) -> io::Result<T> {
        match handle {
            Handle::Own => look(&self.proc.join("self/net")),
            Handle::Process(pid) => look(&self.process(*pid).join("net")),
            Handle::Mount(_) => {
                let there = self.open(namespace, handle)?;
                within(&there, home, || look(&self.proc.join("thread-self/net")))?
            }
        }
    }

    /// Processes, ascending.
    ///
    /// # Errors
    /// Without a readable `/proc`.
    pub fn pids(&self) -> io::Result<Vec<u32>> {
        numbers_in(&self.proc)
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
/// brings the thread back to `home`. Everything that the thread opens meanwhile
/// belongs to the other namespace, so it must do nothing else.
///
/// # Errors
/// PermissionDenied without CAP_SYS_ADMIN over both namespaces.
///
/// # Panics
/// When the thread cannot return: it must not go on in the wrong namespace.
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
    /// By id and whether it is a surrogate id: the index in `found`, none
    /// beyond [`MAX_NAMESPACES`]. At most four times that many.
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
            None => {}
        }
    }
}

/// The inode of the TCP table in a `net` directory of `/proc`.
fn table_inode(net: &Path) -> io::Result<u64> {
    Ok(fs::metadata(net.join(Family::V4.file()))?.ino())
}

/// The inode in a link such as `net:[4026531840]`, whose kind is `net`.
pub(super) fn link_inode(path: &Path, kind: &str) -> io::Result<u32> {
    let link = fs::read_link(path)?;
    parse_link(link.as_os_str().as_encoded_bytes(), kind).ok_or(ErrorKind::InvalidData.into())
}

fn parse_link(link: &[u8], kind: &str) -> Option<u32> {
    let inode = link.strip_prefix(kind.as_bytes())?.strip_prefix(b":[")?;
    std::str::from_utf8(inode.strip_suffix(b"]")?)
        .ok()?
        .parse()
        .ok()
}

/// The entries of a directory that are numbers, ascending.
fn numbers_in(directory: &Path) -> io::Result<Vec<u32>> {
    let mut numbers: Vec<u32> = fs::read_dir(directory)?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// The inode of a file that holds a namespace. What is not of nsfs is not
/// opened: it could be a FIFO, or the empty file of a namespace that is gone.
fn namespace_file(path: &Path) -> Option<NetnsId> {
    if rustix::fs::statfs(path).ok()?.f_type as u32 != NSFS_MAGIC {
        return None;
    }
    // Other kinds of namespaces can be mounted, too; setns refuses them.
    u32::try_from(fs::metadata(path).ok()?.ino()).ok()
}

/// include/uapi/linux/magic.h
const NSFS_MAGIC: u32 = 0x6e73_6673;

#[cfg(test)]
mod tests;
