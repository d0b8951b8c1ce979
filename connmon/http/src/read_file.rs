//! Reading the files that the configuration names: neither what a path leads
//! to nor how much is in it can hang the caller or fill its memory.

use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Reads the whole of a regular file of at most `most` bytes, whole MiB.
///
/// # Errors
/// When the path leads to something else or to a larger file
/// ([`io::ErrorKind::FileTooLarge`]), in words that go behind the path and a
/// colon; else the kernel's error, untouched.
pub fn read_file(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let (file, metadata) = open_regular(path)?;
    let too_large = || {
        let text = format!("larger than the {} MiB allowed", most >> 20);
        io::Error::new(io::ErrorKind::FileTooLarge, text)
    };
    if metadata.len() > most {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize + 1);
    // A file can grow while it is read.
    file.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(too_large());
    }
    Ok(bytes)
}

/// Opens a regular file for reading. What is none is not opened: opening a
/// FIFO waits for a writer, and opening a device can have effects.
///
/// # Errors
/// As [`read_file`].
pub fn open_regular(path: &Path) -> io::Result<(File, Metadata)> {
    let regular = |metadata: Metadata| match kind(metadata.file_type()) {
        None => Ok(metadata),
        Some(kind) => Err(io::Error::other(format!("is {kind}, not a regular file"))),
    };
    regular(std::fs::metadata(path)?)?;
    // Another file may have taken the path since: without O_NONBLOCK this
    // would wait for the writer of a FIFO (fifo(7)).
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    let metadata = regular(file.metadata()?)?;
    Ok((file, metadata))
}

/// What it is, unless a regular file.
fn kind(file_type: FileType) -> Option<&'static str> {
    Some(match file_type {
        it if it.is_file() => return None,
        it if it.is_dir() => "a directory",
        it if it.is_fifo() => "a FIFO",
        it if it.is_socket() => "a socket",
        it if it.is_char_device() => "a character device",
        it if it.is_block_device() => "a block device",
        _ => "of an unknown kind",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    /// Reads in a thread of its own, so that a read that hangs fails the test.
    fn read(path: &Path, most: u64) -> Result<Vec<u8>, String> {
        let (done, result) = mpsc::sync_channel(1);
        let path = path.to_owned();
        std::thread::spawn(move || done.send(read_file(&path, most)));
        let result = result.recv_timeout(Duration::from_secs(20));
        result
            .expect("the read ends")
            .map_err(|error| error.to_string())
    }

    #[test]
    fn only_regular_files_are_read() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        let fifo = rustix::fs::FileType::Fifo;
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), fifo, mode, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        std::os::unix::fs::symlink(at("fifo"), at("link")).unwrap();
        for (path, what) in [
            (at("fifo"), "is a FIFO, not a regular file"),
            (at("link"), "is a FIFO, not a regular file"),
            (at("socket"), "is a socket, not a regular file"),
            (at(""), "is a directory, not a regular file"),
            (
                "/dev/zero".into(),
                "is a character device, not a regular file",
            ),
            (
                "/dev/tty".into(),
                "is a character device, not a regular file",
            ),
        ] {
            assert_eq!(
                read(&path, 1 << 20),
                Err(what.to_owned()),
                "{}",
                path.display()
            );
        }
        assert!(
            read(&at("missing"), 1 << 20)
                .unwrap_err()
                .contains("os error 2")
        );
    }

    #[test]
    fn no_more_than_the_bound_is_read() {
        const MIB: u64 = 1 << 20;
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("file");
        let full = vec![b'x'; MIB as usize];
        std::fs::write(&path, &full).unwrap();
        assert_eq!(read(&path, MIB), Ok(full));
        let too_large = Err("larger than the 1 MiB allowed".to_owned());
        for size in [MIB + 1, 1 << 40] {
            // Sparse.
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.set_len(size).unwrap();
            assert_eq!(read(&path, MIB), too_large, "{size}");
        }
        // More in it than its size.
        let maps = Path::new("/proc/self/maps");
        assert_eq!(std::fs::metadata(maps).unwrap().len(), 0);
        assert_eq!(read(maps, 0), Err("larger than the 0 MiB allowed".into()));
    }
}
