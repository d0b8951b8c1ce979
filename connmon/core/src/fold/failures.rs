//! Why an active open never completed.

use super::snapshot::FailureReason;

/// The reason of a failed connect: `sk_err` at →CLOSE of an active socket
/// that was never open, and for 0 whether a segment ever left (kernel-notes
/// §8). Where the rung cannot read the segment count, a close without an
/// error is `aborted`.
pub fn failure_reason(error: u32, segments_out: Option<u32>) -> FailureReason {
    match (error, segments_out) {
        (libc_errno::ECONNREFUSED, _) => FailureReason::Refused,
        (libc_errno::ETIMEDOUT, _) => FailureReason::Timeout,
        (libc_errno::ECONNRESET, _) => FailureReason::Reset,
        (libc_errno::EHOSTUNREACH, _) => FailureReason::HostUnreachable,
        (libc_errno::ENETUNREACH, _) => FailureReason::NetworkUnreachable,
        (libc_errno::ECONNABORTED, _) => FailureReason::Aborted,
        (0, Some(0)) => FailureReason::Local,
        (0, _) => FailureReason::Aborted,
        _ => FailureReason::Other,
    }
}

/// How long a connect() that fails by itself without a segment takes at most:
/// what stands between its two state changes is a look-up of its port. Another
/// look at the socket needs at least the way back to its process.
const IN_ONE_CALL_NS: u64 = 10_000;

/// Whether an active open ended that its process gave up before anything was
/// sent: a Fast Open connect() that is never written to, and no failure. It had
/// a port, no error and no segment, and did not end within the call.
pub fn is_unwritten(
    local_port: u16,
    error: u32,
    segments_out: Option<u32>,
    lasted_ns: Option<u64>,
) -> bool {
    local_port != 0
        && (error, segments_out) == (0, Some(0))
        && lasted_ns.is_some_and(|lasted| lasted > IN_ONE_CALL_NS)
}

/// The errnos above as the unsigned numbers the kernel record carries.
mod libc_errno {
    pub(super) const ENETUNREACH: u32 = libc::ENETUNREACH as u32;
    pub(super) const ECONNABORTED: u32 = libc::ECONNABORTED as u32;
    pub(super) const ECONNRESET: u32 = libc::ECONNRESET as u32;
    pub(super) const ETIMEDOUT: u32 = libc::ETIMEDOUT as u32;
    pub(super) const ECONNREFUSED: u32 = libc::ECONNREFUSED as u32;
    pub(super) const EHOSTUNREACH: u32 = libc::EHOSTUNREACH as u32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connect_that_was_never_written_did_not_fail() {
        let lasted = Some(IN_ONE_CALL_NS + 1);
        assert!(is_unwritten(40_000, 0, Some(0), lasted));
        // No port, refused, aborted after a SYN, not known, failed in the call.
        assert!(!is_unwritten(0, 0, Some(0), lasted));
        assert!(!is_unwritten(40_000, 111, Some(0), lasted));
        assert!(!is_unwritten(40_000, 0, Some(1), lasted));
        assert!(!is_unwritten(40_000, 0, None, lasted));
        assert!(!is_unwritten(40_000, 0, Some(0), Some(IN_ONE_CALL_NS)));
        assert!(!is_unwritten(40_000, 0, Some(0), None));
    }

    #[test]
    fn every_reason_of_the_contract() {
        let cases = [
            (111, Some(1), FailureReason::Refused),
            (110, None, FailureReason::Timeout),
            (104, Some(2), FailureReason::Reset),
            (113, Some(1), FailureReason::HostUnreachable),
            (101, Some(1), FailureReason::NetworkUnreachable),
            (103, Some(1), FailureReason::Aborted),
            (0, Some(1), FailureReason::Aborted),
            (0, None, FailureReason::Aborted),
            (0, Some(0), FailureReason::Local),
            (32, Some(1), FailureReason::Other),
        ];
        for (error, segments_out, expected) in cases {
            assert_eq!(
                failure_reason(error, segments_out),
                expected,
                "{error} {segments_out:?}"
            );
        }
    }
}
