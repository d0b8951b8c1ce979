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

/// Whether an active open ended that its process closed before anything was
/// sent: a Fast Open connect() that was never written to, and no failure. A
/// connect() that fails by itself does not shut the socket down.
pub fn is_unwritten(error: u32, segments_out: Option<u32>, shut_down: bool) -> bool {
    shut_down && (error, segments_out) == (0, Some(0))
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
        assert!(is_unwritten(0, Some(0), true));
        // Failed in the call, refused, aborted after a SYN, not known.
        assert!(!is_unwritten(0, Some(0), false));
        assert!(!is_unwritten(111, Some(0), true));
        assert!(!is_unwritten(0, Some(1), true));
        assert!(!is_unwritten(0, None, true));
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
