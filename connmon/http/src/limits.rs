//! How much the server gives a client: connections, bytes, seconds.

use std::time::Duration;

/// The server's bounds. [`Limits::default`] is what is documented and what
/// the agent runs with; tests shorten the times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections served at once; more if `--web.max-requests` needs them.
    /// Beyond that, the client with the most connections loses the one whose
    /// request began first.
    pub connections: usize,
    /// From accept to the end of the TLS handshake.
    pub handshake: Duration,
    /// From the first byte of a request (on a new connection: from its
    /// start) to the end of the header.
    pub header: Duration,
    /// Between the end of a response and the first byte of the next request.
    pub idle: Duration,
    /// From the start of a response until its last byte is handed to the
    /// kernel, however slowly the client reads.
    pub write: Duration,
    /// How long a response may be under way before its reader is closed for a
    /// scrape that `--web.max-requests` would refuse: slow readers cannot
    /// hold every place. If the reader's client has more scrapes in flight
    /// than the other, [`Self::fresh`] is enough.
    pub slow_reader: Duration,
    /// How long the fold is waited for; on top of the reporter's own limit.
    pub report: Duration,
    /// How often the deadlines above are looked at, so how late they can be.
    pub tick: Duration,
    /// How long a connection has, from the start of its step, before it can
    /// be closed for a newcomer, and the longest that a newcomer waits: enough
    /// for the request of a client 20 ms away to arrive.
    pub fresh: Duration,
    /// How long requests in flight may take to finish after the server is asked
    /// to stop.
    pub drain: Duration,
    /// Request line and header together, bytes; more is 431.
    pub header_bytes: usize,
    /// Header fields; more is 431.
    pub header_fields: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            handshake: Duration::from_secs(10),
            header: Duration::from_secs(10),
            idle: Duration::from_secs(120),
            write: Duration::from_secs(30),
            slow_reader: Duration::from_secs(2),
            report: Duration::from_secs(10),
            tick: Duration::from_secs(1),
            fresh: Duration::from_millis(50),
            drain: Duration::from_millis(500),
            header_bytes: 16 * 1024,
            header_fields: 64,
        }
    }
}
