//! The seven usual `process_*` metrics.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{Dir, Mode, OFlags};
use rustix::process::{Resource, getrlimit};

/// What Prometheus client libraries export about a process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProcessStats {
    /// User and system CPU time in seconds, to the hundredth.
    pub cpu_seconds: f64,
    /// Open file descriptors.
    pub open_fds: f64,
    /// Soft limit of file descriptors.
    pub max_fds: f64,
    /// Virtual memory, bytes.
    pub virtual_memory_bytes: f64,
    /// Soft limit of virtual memory, bytes; 2^64 - 1 when unlimited, as in
    /// Go's client.
    pub virtual_memory_max_bytes: f64,
    /// Resident memory, bytes.
    pub resident_memory_bytes: f64,
    /// Start of the process, Unix seconds.
    pub start_time_seconds: f64,
}

/// The files they are read from, opened once at start: the sandbox hides /proc
/// later.
#[derive(Debug)]
pub struct Process {
    stat: File,
    fds: Dir,
    /// Of the kernel's boot, Unix seconds.
    boot_time: f64,
}

impl Process {
    /// Opens /proc/self.
    ///
    /// # Errors
    /// When /proc is not there.
    pub fn open() -> std::io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fds = rustix::fs::open("/proc/self/fd", flags, Mode::empty())?;
        Ok(Self {
            stat: File::open("/proc/self/stat")?,
            fds: Dir::new(fds)?,
            boot_time: boot_time().unwrap_or(0.0),
        })
    }

    /// The values now; `None` when /proc cannot be read any more.
    pub fn read(&mut self) -> Option<ProcessStats> {
        let mut buffer = [0; 1024];
        let length = self.stat.read_at(&mut buffer, 0).ok()?;
        let [user, system, start, virtual_bytes, resident_pages] = stat_fields(&buffer[..length])?;
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        Some(ProcessStats {
            cpu_seconds: hundredths((user + system) as f64 / ticks),
            open_fds: self.open_fds()?,
            max_fds: limit(Resource::Nofile),
            virtual_memory_bytes: virtual_bytes as f64,
            virtual_memory_max_bytes: limit(Resource::As),
            resident_memory_bytes: (resident_pages * rustix::param::page_size() as u64) as f64,
            start_time_seconds: hundredths(self.boot_time + start as f64 / ticks),
        })
    }

    /// Entries of /proc/self/fd, the two descriptors held here included.
    fn open_fds(&mut self) -> Option<f64> {
        self.fds.rewind();
        let mut count = 0_u32;
        while let Some(entry) = self.fds.read() {
            let entry = entry.ok()?;
            count += u32::from(!entry.file_name().to_bytes().starts_with(b"."));
        }
        Some(f64::from(count))
    }
}

/// utime, stime, starttime, vsize and rss of a line of /proc/self/stat,
/// proc_pid_stat(5).
fn stat_fields(line: &[u8]) -> Option<[u64; 5]> {
    // The name in parentheses may hold anything, parentheses included; the
    // fields after it start with the third, the state.
    let end = line.iter().rposition(|byte| *byte == b')')?;
    let text = std::str::from_utf8(&line[end + 1..]).ok()?;
    let fields: Vec<&str> = text.split_ascii_whitespace().collect();
    let mut values = [0; 5];
    for (value, number) in values.iter_mut().zip([14, 15, 22, 23, 24]) {
        *value = fields.get(number - 3)?.parse().ok()?;
    }
    Some(values)
}

fn boot_time() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    line.trim().parse().ok()
}

fn limit(resource: Resource) -> f64 {
    getrlimit(resource).current.unwrap_or(u64::MAX) as f64
}

fn hundredths(seconds: f64) -> f64 {
    (seconds * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_do_not_shift_the_fields() {
        let line = b"42 (a) b) (c) S 1 42 42 0 -1 4194560 1 2 3 4 150 50 7 8 20 0 9 0 1234 5678592 321 18446744073709551615";
        assert_eq!(stat_fields(line), Some([150, 50, 1_234, 5_678_592, 321]));
        assert_eq!(stat_fields(b"42 (x) S 1"), None);
        assert_eq!(stat_fields(b""), None);
    }

    #[test]
    fn it_reads_the_values_of_this_process() {
        let mut process = Process::open().unwrap();
        let before = process.read().unwrap();
        let files: Vec<File> = (0..10)
            .map(|_| File::open("/proc/self/stat").unwrap())
            .collect();
        // CPU time and not wall time: a busy machine gives little of it.
        let spin = std::time::Instant::now();
        let mut after = process.read().unwrap();
        while after.cpu_seconds < before.cpu_seconds + 0.03 {
            assert!(spin.elapsed().as_secs() < 30, "{before:?} {after:?}");
            std::hint::black_box(&files);
            after = process.read().unwrap();
        }
        // Other tests of this process open and close files meanwhile.
        assert!(after.open_fds >= 10.0 && before.open_fds >= 3.0);
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs_f64();
        assert!((now - after.start_time_seconds).abs() < 3_600.0);
        assert!(after.resident_memory_bytes > 1e6);
        assert!(after.virtual_memory_bytes >= after.resident_memory_bytes);
        assert!(after.max_fds >= after.open_fds);
    }
}
