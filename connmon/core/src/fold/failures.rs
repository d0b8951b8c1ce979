//! Why an active open never completed.

use libc::{ECONNABORTED, ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT};

use super::snapshot::FailureReason;

/// The reason of a failed connect: `error` is `sk_err` when an active socket
/// that was never open reaches CLOSE; if it is 0, the number of segments sent
/// decides (kernel-notes §8). If the probe cannot read that number, such a
/// close counts as `aborted`.
pub fn failure_reason(error: u32, segments_out: Option<u32>) -> FailureReason {
    match (error as i32, segments_out) {
        (ECONNREFUSED, _) => FailureReason::Refused,
        (ETIMEDOUT, _) => FailureReason::Timeout,
        (ECONNRESET, _) => FailureReason::Reset,
        (EHOSTUNREACH, _) => FailureReason::HostUnreachable,
        (ENETUNREACH, _) => FailureReason::NetworkUnreachable,
        (0, Some(0)) => FailureReason::Local,
        (ECONNABORTED | 0, _) => FailureReason::Aborted,
        _ => FailureReason::Other,
    }
}

/// Whether an active open was ended by its process before a segment was sent:
/// a Fast Open connect() without a write, which is no failure. A connect()
/// that fails by itself does not shut the socket down.
pub fn is_unwritten(error: u32, segments_out: Option<u32>, shut_down: bool) -> bool {
    shut_down && (error, segments_out) == (0, Some(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unwritten_fast_open_connect_is_no_failure() {
        assert!(is_unwritten(0, Some(0), true));
        // Failed in the call, refused, aborted after a SYN, unknown.
        assert!(!is_unwritten(0, Some(0), false));
        assert!(!is_unwritten(111, Some(0), true));
        assert!(!is_unwritten(0, Some(1), true));
        assert!(!is_unwritten(0, None, true));
    }

    #[test]
    fn each_errno_gives_its_reason() {
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
