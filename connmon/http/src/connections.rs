//! The connections being served: what each one waits for and since when, and
//! which one is closed when the server is full.
//!
//! Stream, handler and response body report to their [`Connection`].
//! [`Connections`] is the bounded table of them.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::Instant;

use crate::limits::Limits;
use crate::lock;

/// How long a newcomer waits when every other connection waits for an answer.
const FULL: Duration = Duration::from_millis(4);

/// What the client has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Finish the TLS handshake; at once without TLS.
    Handshake,
    /// Finish a request header.
    Header,
    /// Begin the next request.
    Idle,
}

/// What a connection is doing.
#[derive(Debug)]
struct Activity {
    step: Step,
    /// When that step began. Bytes do not move it: a client that sends one now
    /// and then is as late as one that sends none.
    since: Instant,
    /// HTTP/2: bytes do not mean that a request has begun.
    multiplexed: bool,
    /// Those whose answers are not flushed yet; HTTP/2 has several.
    requests: HashMap<u64, Request>,
    next_request: u64,
}

#[derive(Debug)]
enum Request {
    /// The header is complete; the credentials may have to be checked.
    Received,
    /// The client waits for the server, not the server for the client.
    Allowed,
    Responding {
        since: Instant,
        /// Whether the last byte is handed to the stream.
        handed_over: bool,
        /// Its place among the scrapes in flight, where it is one.
        permit: Option<OwnedSemaphorePermit>,
    },
}

impl Activity {
    fn begin(&mut self, step: Step) {
        self.step = step;
        self.since = Instant::now();
    }

    /// Starts of the responses under way, and whether each is a scrape.
    fn responses(&self) -> impl Iterator<Item = (Instant, bool)> {
        self.requests.values().filter_map(|request| match request {
            Request::Responding { since, permit, .. } => Some((*since, permit.is_some())),
            _ => None,
        })
    }

    /// Start of the oldest response under way. Each has its own time: over
    /// HTTP/2 a new one may begin before the last has ended, for ever.
    fn response_since(&self) -> Option<Instant> {
        self.responses().map(|(since, _)| since).min()
    }

    /// When the connection has to be closed unless the client goes on; `None`
    /// while the next step is the server's.
    fn deadline(&self, limits: &Limits) -> Option<Instant> {
        if let Some(since) = self.response_since() {
            return Some(since + limits.write);
        }
        let time = match self.step {
            Step::Handshake => limits.handshake,
            Step::Header => limits.header,
            Step::Idle => limits.idle,
        };
        self.requests.is_empty().then_some(self.since + time)
    }

    /// When the client's step, or the oldest response to it, began; `None`
    /// while the client waits for the server.
    fn unfinished_since(&self) -> Option<Instant> {
        let waits = |request: &Request| matches!(request, Request::Allowed);
        let waits = self.requests.values().any(waits);
        (!waits).then(|| self.response_since().unwrap_or(self.since))
    }
}

/// A connection, shared by the table and those who report to it.
#[derive(Debug)]
pub(crate) struct Connection {
    /// The other end, as [`client_of`] counts.
    pub(crate) client: IpAddr,
    activity: Mutex<Activity>,
    /// Notified when the connection has to end at once.
    pub(crate) close: Notify,
}

impl Connection {
    fn new(client: IpAddr) -> Arc<Self> {
        let activity = Mutex::new(Activity {
            step: Step::Handshake,
            since: Instant::now(),
            multiplexed: false,
            requests: HashMap::new(),
            next_request: 0,
        });
        Arc::new(Self {
            client,
            activity,
            close: Notify::new(),
        })
    }

    fn activity(&self) -> MutexGuard<'_, Activity> {
        lock(&self.activity)
    }

    pub(crate) fn handshaken(&self, multiplexed: bool) {
        let mut activity = self.activity();
        activity.multiplexed = multiplexed;
        activity.begin(Step::Header);
    }

    pub(crate) fn bytes_read(&self) {
        let mut activity = self.activity();
        if activity.step == Step::Idle && !activity.multiplexed && activity.requests.is_empty() {
            activity.begin(Step::Header);
        }
    }

    pub(crate) fn flushed(&self) {
        let mut activity = self.activity();
        let before = activity.requests.len();
        activity.requests.retain(|_, request| {
            !matches!(request, Request::Responding { handed_over, .. } if *handed_over)
        });
        if activity.requests.len() < before && activity.response_since().is_none() {
            activity.begin(Step::Idle);
        }
    }

    /// Whether there is a response whose end is not flushed yet.
    pub(crate) fn is_responding(&self) -> bool {
        self.activity().response_since().is_some()
    }

    /// A header is complete.
    pub(crate) fn request(self: &Arc<Self>) -> InFlight {
        let mut activity = self.activity();
        let id = activity.next_request;
        activity.next_request += 1;
        activity.requests.insert(id, Request::Received);
        InFlight(Arc::clone(self), id)
    }
}

/// A request; kept until the last byte of its response is handed to the
/// stream.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Connection>, u64);

impl InFlight {
    fn set(&self, request: Request) {
        self.0.activity().requests.insert(self.1, request);
    }

    /// The request may be answered.
    pub(crate) fn allowed(&self) {
        self.set(Request::Allowed);
    }

    /// The response begins. The permit is kept until its end is flushed.
    pub(crate) fn response_begins(&self, permit: Option<OwnedSemaphorePermit>) {
        self.set(Request::Responding {
            since: Instant::now(),
            handed_over: false,
            permit,
        });
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let requests = &mut self.0.activity().requests;
        if let Some(Request::Responding { handed_over, .. }) = requests.get_mut(&self.1) {
            *handed_over = true;
        } else {
            // Given up before it had a response.
            requests.remove(&self.1);
        }
    }
}

/// What counts as one client: an IPv4 address, mapped into IPv6 or not, or
/// an IPv6 /64, all of which one host can have.
fn client_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            Ipv6Addr::from_bits(network).into()
        }
        address => address,
    }
}

/// The connections being served, at most [`Limits::connections`].
#[derive(Debug)]
pub(crate) struct Connections {
    limits: Arc<Limits>,
    table: Mutex<Vec<Arc<Connection>>>,
    /// A place was given back.
    freed: Notify,
}

impl Connections {
    pub(crate) fn new(limits: Arc<Limits>) -> Arc<Self> {
        Arc::new(Self {
            limits,
            table: Mutex::default(),
            freed: Notify::new(),
        })
    }

    fn table(&self) -> MutexGuard<'_, Vec<Arc<Connection>>> {
        lock(&self.table)
    }

    /// A place for a connection from `peer`. If all are taken, the client with
    /// the most connections loses the one whose step began first; connections
    /// that wait for an answer are neither counted nor closed. Waits
    /// [`Limits::fresh`] at most; `None` if every connection waits for an
    /// answer.
    pub(crate) async fn admit(self: &Arc<Self>, peer: IpAddr) -> Option<Slot> {
        let client = client_of(peer);
        let began = Instant::now();
        loop {
            let until = match self.try_admit(client, began) {
                Ok(slot) => return Some(slot),
                Err(until) if until <= Instant::now() => return None,
                Err(until) => until,
            };
            // A place that becomes free ends the wait early.
            let _ = tokio::time::timeout_at(until, self.freed.notified()).await;
        }
    }

    /// A place for a client that has waited since `began`, or the time of the
    /// next attempt; if that has passed, there is none.
    fn try_admit(self: &Arc<Self>, client: IpAddr, began: Instant) -> Result<Slot, Instant> {
        let mut table = self.table();
        if table.len() >= self.limits.connections {
            let oldest = choose(unfinished(&table), Some(client));
            let ((oldest, since), _) = oldest.ok_or(began + FULL)?;
            let due = began.min(since) + self.limits.fresh;
            if due > Instant::now() {
                return Err(due);
            }
            close(&mut table, &oldest, "another client needs its place");
        }
        let connection = Connection::new(client);
        table.push(Arc::clone(&connection));
        Ok(Slot {
            connection,
            connections: Arc::clone(self),
        })
    }

    /// Closes every connection that is past its deadline.
    pub(crate) fn close_overdue(&self) {
        let now = Instant::now();
        let mut table = self.table();
        let overdue = table.iter().filter(|it| {
            let deadline = it.activity().deadline(&self.limits);
            deadline.is_some_and(|deadline| deadline <= now)
        });
        for connection in overdue.cloned().collect::<Vec<_>>() {
            close(&mut table, &connection, "timed out");
        }
    }

    /// Closes the connection of a reader so that `client` can have a scrape:
    /// of the client with the most scrapes in flight the oldest, if that takes
    /// too long ([`Limits::slow_reader`]). A client that would still have
    /// fewer scrapes in flight than the other waits for no more than
    /// [`Limits::fresh`].
    pub(crate) fn close_slow_reader(&self, client: IpAddr) -> bool {
        let mut table = self.table();
        let Some(((slowest, since), lead)) = choose(scrapes(&table), Some(client)) else {
            return false;
        };
        let limits = &self.limits;
        let patience = if lead > 0 {
            limits.fresh
        } else {
            limits.slow_reader
        };
        let slow = since.elapsed() >= patience;
        if slow {
            close(
                &mut table,
                &slowest,
                "reads slowly, and another client scrapes",
            );
        }
        slow
    }

    /// Closes a connection to free its file descriptor.
    pub(crate) fn close_one(&self) {
        let mut table = self.table();
        if let Some(((oldest, _), _)) = choose(unfinished(&table), None) {
            close(&mut table, &oldest, "no file descriptor is left");
        }
    }
}

/// What a client may have to give up, and since when it has it.
type Held = (Arc<Connection>, Instant);

/// The connections that may be closed.
fn unfinished(table: &[Arc<Connection>]) -> Vec<Held> {
    let held = |it: &Arc<Connection>| Some((Arc::clone(it), it.activity().unfinished_since()?));
    table.iter().filter_map(held).collect()
}

/// The scrapes whose answers are under way.
fn scrapes(table: &[Arc<Connection>]) -> Vec<Held> {
    let mut all = Vec::new();
    for connection in table {
        let activity = connection.activity();
        let scrapes = activity.responses().filter(|(_, is_scrape)| *is_scrape);
        all.extend(scrapes.map(|(since, _)| (Arc::clone(connection), since)));
    }
    all
}

/// Chooses the oldest of the client that has the most, the newcomer's client
/// counted with the one that it wants. Returns also how many more that client
/// has than the newcomer would.
fn choose(all: Vec<Held>, newcomer: Option<IpAddr>) -> Option<(Held, usize)> {
    let mut counts = HashMap::new();
    let clients = all.iter().map(|(connection, _)| connection.client);
    for client in clients.chain(newcomer) {
        *counts.entry(client).or_insert(0_usize) += 1;
    }
    let own = newcomer.map_or(0, |client| counts[&client]);
    let of_most = |(connection, since): &Held| (counts[&connection.client], Reverse(*since));
    let chosen = all.into_iter().max_by_key(of_most)?;
    let lead = counts[&chosen.0.client].saturating_sub(own);
    Some((chosen, lead))
}

fn close(table: &mut Vec<Arc<Connection>>, connection: &Arc<Connection>, why: &str) {
    log::debug!("connection from {} closed: {why}", connection.client);
    connection.close.notify_one();
    table.retain(|it| !Arc::ptr_eq(it, connection));
}

/// A place in the table; given back on drop.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) connection: Arc<Connection>,
    connections: Arc<Connections>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut table = self.connections.table();
        table.retain(|it| !Arc::ptr_eq(it, &self.connection));
        drop(table);
        self.connections.freed.notify_one();
    }
}

#[cfg(test)]
mod tests;
