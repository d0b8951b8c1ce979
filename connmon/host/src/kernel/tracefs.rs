//! tracefs: whether it can be read, and whether the tracepoint has the fields
//! that the program reads.

use std::fs;
use std::io;

use connmon_common::tuning::SetState;
use connmon_core::probe::{AttachFailure, Method, Stage};

/// Where tracefs may be mounted.
const ROOTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// How to give this user access to tracefs.
pub const OPEN_TRACEFS: &str =
    "run as root, grant CAP_DAC_READ_SEARCH, or mount -o remount,mode=755 /sys/kernel/tracing";
/// How to mount it.
pub const MOUNT_TRACEFS: &str = "mount -t tracefs tracefs /sys/kernel/tracing";

/// As above, for a kernel without BTF.
pub const MOUNT_TRACEFS_OR_BTF: &str =
    "mount -t tracefs tracefs /sys/kernel/tracing, or run a kernel with BTF";

/// Whether this user can read tracefs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracefs {
    /// Its events can be read.
    Mounted,
    /// This user may not read it (its mode is usually 0700).
    Closed,
    /// It is not mounted.
    Absent,
}

impl Tracefs {
    pub(super) fn read() -> Self {
        let [own, debug] = ROOTS.map(|root| fs::metadata(format!("{root}/events")));
        match (own, debug) {
            (Ok(_), _) | (_, Ok(_)) => Self::Mounted,
            // An unreadable debugfs proves nothing, and is not needed.
            (Err(error), _) if error.kind() == io::ErrorKind::PermissionDenied => Self::Closed,
            _ => Self::Absent,
        }
    }
}

/// Whether the tracepoint has the fields that the program reads.
pub(super) fn check_tracepoint() -> Result<(), AttachFailure> {
    let formats = ROOTS
        .map(|root| fs::read_to_string(format!("{root}/events/sock/inet_sock_set_state/format")));
    let (stage, errno, message) = match formats {
        [Ok(format), _] | [Err(_), Ok(format)] => match check_format(&format) {
            Ok(()) => return Ok(()),
            Err(message) => (Stage::Format, None, message),
        },
        [Err(error), _] => {
            let message = match error.kind() {
                io::ErrorKind::NotFound => format!("tracefs is not mounted ({MOUNT_TRACEFS})"),
                _ => format!("tracefs cannot be read ({error})"),
            };
            (Stage::Tracefs, error.raw_os_error(), message)
        }
    };
    Err(AttachFailure {
        errno,
        ..AttachFailure::new(Method::Tracepoint, stage, message)
    })
}

/// Compares a tracepoint's `format` file with [`SetState`].
fn check_format(format: &str) -> Result<(), String> {
    for (name, offset, size) in SetState::ASSERTED {
        let found = format.lines().find_map(|line| {
            // "\tfield:__u8 saddr_v6[16];\toffset:40;\tsize:16;\tsigned:0;"
            let mut parts = line.trim().strip_prefix("field:")?.split(';');
            let declared = parts.next()?.rsplit([' ', '*']).next()?;
            if declared.split('[').next()? != *name {
                return None;
            }
            let mut number = |prefix: &str| -> Option<usize> {
                parts.next()?.trim().strip_prefix(prefix)?.parse().ok()
            };
            Some((number("offset:")?, number("size:")?))
        });
        let (at, of) = found.ok_or_else(|| format!("the tracepoint has no field {name}"))?;
        if (at, of) != (*offset, *size) {
            return Err(format!(
                "the tracepoint has {name} at offset {at} with {of} bytes, not at {offset} with {size}"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 5.10 to 7.2 show it.
    const FORMAT: &str = "\
name: inet_sock_set_state
ID: 1480
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:const void * skaddr;\toffset:8;\tsize:8;\tsigned:0;
\tfield:int oldstate;\toffset:16;\tsize:4;\tsigned:1;
\tfield:int newstate;\toffset:20;\tsize:4;\tsigned:1;
\tfield:__u16 sport;\toffset:24;\tsize:2;\tsigned:0;
\tfield:__u16 dport;\toffset:26;\tsize:2;\tsigned:0;
\tfield:__u16 family;\toffset:28;\tsize:2;\tsigned:0;
\tfield:__u16 protocol;\toffset:30;\tsize:2;\tsigned:0;
\tfield:__u8 saddr[4];\toffset:32;\tsize:4;\tsigned:0;
\tfield:__u8 daddr[4];\toffset:36;\tsize:4;\tsigned:0;
\tfield:__u8 saddr_v6[16];\toffset:40;\tsize:16;\tsigned:0;
\tfield:__u8 daddr_v6[16];\toffset:56;\tsize:16;\tsigned:0;
";

    #[test]
    fn unknown_tracepoint_format_is_refused() {
        assert_eq!(check_format(FORMAT), Ok(()));
        // Before 5.6: one byte of protocol, addresses one byte earlier.
        let old = FORMAT.replace(
            "__u16 protocol;\toffset:30;\tsize:2",
            "__u8 protocol;\toffset:30;\tsize:1",
        );
        assert_eq!(
            check_format(&old).unwrap_err(),
            "the tracepoint has protocol at offset 30 with 1 bytes, not at 30 with 2"
        );
        // Old PREEMPT_RT: a longer common header.
        let shifted = FORMAT.replace("skaddr;\toffset:8", "skaddr;\toffset:16");
        assert!(
            check_format(&shifted)
                .unwrap_err()
                .contains("skaddr at offset 16")
        );
        let without = FORMAT.replace("newstate", "state");
        assert_eq!(
            check_format(&without).unwrap_err(),
            "the tracepoint has no field newstate"
        );
        assert!(check_format("").is_err());
    }
}
