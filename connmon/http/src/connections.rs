//! Who is connected, what each waits for and since when, and who gives way
//! when the server is full.
//!
//! [`Activity`] is the pure part: what one connection is doing, as the
//! stream, the handler and the response body report it, and until when it may
//! go on. [`Connections`] is the bounded table of them.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use crate::limits::Limits;

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

/// What a connection is doing. Time is a parameter of every method.
#[derive(Debug)]
pub(crate) struct Activity {
    step: Step,
    /// When that step began. Bytes do not move it: a client that dribbles is
    /// as late as one that is silent.
    since: Instant,
    /// HTTP/2: bytes do not mean that a request has begun.
    multiplexed: bool,
    /// Requests with the handler.
    handling: usize,
    /// Of those, the ones past authentication: we keep the client waiting,
    /// not the client us.
    working: usize,
    /// Responses whose end is not flushed yet, oldest first; HTTP/2 has
    /// several, at most one a stream.
    responses: Vec<Response>,
    next_response: u64,
}

/// An answer on its way.
#[derive(Debug)]
struct Response {
    id: u64,
    began: Instant,
    /// Whether its last byte is handed to the stream.
    handed_over: bool,
    /// Its place among the scrapes in flight, where it is one.
    permit: Option<OwnedSemaphorePermit>,
}

impl Activity {
    fn new(now: Instant) -> Self {
        Self {
            step: Step::Handshake,
            since: now,
            multiplexed: false,
            handling: 0,
            working: 0,
            responses: Vec::new(),
            next_response: 0,
        }
    }

    fn begin(&mut self, step: Step, now: Instant) {
        self.step = step;
        self.since = now;
    }

    fn handshaken(&mut self, multiplexed: bool, now: Instant) {
        self.multiplexed = multiplexed;
        self.begin(Step::Header, now);
    }

    fn bytes_read(&mut self, now: Instant) {
        let answering = self.handling > 0 || self.response_since().is_some();
        if self.step == Step::Idle && !self.multiplexed && !answering {
            self.begin(Step::Header, now);
        }
    }

    fn flushed(&mut self, now: Instant) {
        let before = self.responses.len();
        self.responses.retain(|response| !response.handed_over);
        if self.responses.is_empty() && before > 0 {
            self.begin(Step::Idle, now);
        }
    }

    fn response_begins(&mut self, now: Instant, permit: Option<OwnedSemaphorePermit>) -> u64 {
        let id = self.next_response;
        self.next_response += 1;
        self.responses.push(Response {
            id,
            began: now,
            handed_over: false,
            permit,
        });
        id
    }

    fn response_ends(&mut self, id: u64) {
        let mut responses = self.responses.iter_mut();
        if let Some(response) = responses.find(|response| response.id == id) {
            response.handed_over = true;
        }
    }

    /// Start of the oldest response under way. Each has its own time: over
    /// HTTP/2 a new one may begin before the last has ended, for ever.
    fn response_since(&self) -> Option<Instant> {
        self.responses.first().map(|response| response.began)
    }

    /// Starts of the scrapes whose answers are under way.
    fn scrapes_since(&self) -> impl Iterator<Item = Instant> {
        let scrapes = self.responses.iter().filter(|it| it.permit.is_some());
        scrapes.map(|response| response.began)
    }

    /// When the connection has to be cut unless it gets on; `None` while the
    /// next step is ours.
    fn deadline(&self, limits: &Limits) -> Option<Instant> {
        if let Some(since) = self.response_since() {
            return Some(since + limits.write);
        }
        let time = match self.step {
            Step::Handshake => limits.handshake,
            Step::Header => limits.header,
            Step::Idle => limits.idle,
        };
        (self.handling == 0).then_some(self.since + time)
    }

    /// When the client's step, or the oldest response to it, began; `None`
    /// while the client waits for us.
    fn unfinished_since(&self) -> Option<Instant> {
        (self.working == 0).then(|| self.response_since().unwrap_or(self.since))
    }
}

/// A connection's [`Activity`], shared by those who report to it.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    client: IpAddr,
    activity: Arc<Mutex<Activity>>,
}

impl Watch {
    fn new(client: IpAddr) -> Self {
        Self {
            client,
            activity: Arc::new(Mutex::new(Activity::new(Instant::now()))),
        }
    }

    fn activity(&self) -> MutexGuard<'_, Activity> {
        // Every change is complete in itself, so a panic elsewhere while the
        // lock was held has left nothing half done.
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who the other end is, as [`client_of`] counts.
    pub(crate) fn client(&self) -> IpAddr {
        self.client
    }

    pub(crate) fn handshaken(&self, multiplexed: bool) {
        self.activity().handshaken(multiplexed, Instant::now());
    }

    pub(crate) fn bytes_read(&self) {
        self.activity().bytes_read(Instant::now());
    }

    pub(crate) fn flushed(&self) {
        self.activity().flushed(Instant::now());
    }

    /// Whether there is a response whose end is not flushed yet.
    pub(crate) fn is_responding(&self) -> bool {
        self.activity().response_since().is_some()
    }

    /// A header is complete; hold the guard while the request is handled.
    pub(crate) fn request(&self) -> Handling {
        self.activity().handling += 1;
        Handling(self.clone())
    }

    /// The request may be answered; hold the guard while that is made.
    pub(crate) fn work(&self) -> Working {
        self.activity().working += 1;
        Working(self.clone())
    }

    /// A response is there; hold the guard until its last byte is taken. The
    /// permit is kept until that is flushed.
    pub(crate) fn response(&self, permit: Option<OwnedSemaphorePermit>) -> Responding {
        let id = self.activity().response_begins(Instant::now(), permit);
        Responding(self.clone(), id)
    }
}

/// See [`Watch::request`].
pub(crate) struct Handling(Watch);

impl Drop for Handling {
    fn drop(&mut self) {
        self.0.activity().handling -= 1;
    }
}

/// See [`Watch::work`].
pub(crate) struct Working(Watch);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.activity().working -= 1;
    }
}

/// See [`Watch::response`].
#[derive(Debug)]
pub(crate) struct Responding(Watch, u64);

impl Drop for Responding {
    fn drop(&mut self) {
        self.0.activity().response_ends(self.1);
    }
}

/// What counts as one client: an IPv4 address, mapped into IPv6 or not, or
/// an IPv6 /64, all of which one host can have.
pub(crate) fn client_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            Ipv6Addr::from_bits(network).into()
        }
        address => address,
    }
}

/// How long a newcomer waits when every other connection waits for us.
const FULL: Duration = Duration::from_millis(4);

/// The connections being served, at most [`Limits::connections`].
#[derive(Debug)]
pub(crate) struct Connections {
    limits: Arc<Limits>,
    table: Mutex<Table>,
    /// A place was given back.
    freed: Notify,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    entries: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    watch: Watch,
    cut: oneshot::Sender<()>,
}

impl Connections {
    pub(crate) fn new(limits: Arc<Limits>) -> Arc<Self> {
        Arc::new(Self {
            limits,
            table: Mutex::default(),
            freed: Notify::new(),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection from `peer`. If all are taken, the client with
    /// the most connections loses the one whose step began first; connections
    /// that wait for an answer of ours are neither counted nor cut. Waits
    /// [`Limits::fresh`] at most; `None` if every connection waits for us.
    pub(crate) async fn admit(self: &Arc<Self>, peer: IpAddr) -> Option<Slot> {
        let client = client_of(peer);
        let began = Instant::now();
        loop {
            let until = match self.try_admit(client, began) {
                Ok(slot) => return Some(slot),
                Err(until) => until,
            };
            if until <= Instant::now() {
                return None;
            }
            // A place that becomes free ends the wait early.
            let _ = tokio::time::timeout_at(until, self.freed.notified()).await;
        }
    }

    /// A place for a client that has waited since `began`, or the time of the
    /// next attempt; if that has passed, there is none.
    fn try_admit(self: &Arc<Self>, client: IpAddr, began: Instant) -> Result<Slot, Instant> {
        let mut table = self.table();
        if table.entries.len() >= self.limits.connections {
            let Some(oldest) = choose(table.unfinished(), Some(client)) else {
                return Err(began + FULL);
            };
            let due = began.min(oldest.since) + self.limits.fresh;
            if due > Instant::now() {
                return Err(due);
            }
            table.cut(oldest.id, "gave way to another client");
        }
        let id = table.next;
        table.next += 1;
        let watch = Watch::new(client);
        let (cut, order) = oneshot::channel();
        let entry = Entry {
            watch: watch.clone(),
            cut,
        };
        table.entries.insert(id, entry);
        Ok(Slot {
            id,
            connections: Arc::clone(self),
            watch,
            order,
        })
    }

    /// Cuts every connection that is past its deadline.
    pub(crate) fn cut_overdue(&self) {
        let now = Instant::now();
        let mut table = self.table();
        let overdue: Vec<u64> = table
            .entries
            .iter()
            .filter(|(_, entry)| {
                let deadline = entry.watch.activity().deadline(&self.limits);
                deadline.is_some_and(|deadline| deadline <= now)
            })
            .map(|(id, _)| *id)
            .collect();
        for id in overdue {
            table.cut(id, "timed out");
        }
    }

    /// Cuts a reader to make room for a scrape of `client`: of the client
    /// with the most scrapes in flight the oldest, if that takes too long
    /// ([`Limits::slow_reader`]). A client that would still have fewer scrapes
    /// in flight than the other waits for no more than [`Limits::fresh`].
    pub(crate) fn cut_slow_reader(&self, client: IpAddr) -> bool {
        let mut table = self.table();
        let Some(slowest) = choose(table.scrapes(), Some(client)) else {
            return false;
        };
        let patience = if slowest.lead > 0 {
            self.limits.fresh
        } else {
            self.limits.slow_reader
        };
        let slow = slowest.since.elapsed() >= patience;
        if slow {
            table.cut(slowest.id, "slow reader when another scrape came");
        }
        slow
    }

    /// Cuts a connection to free a file descriptor.
    pub(crate) fn cut_one(&self) {
        let mut table = self.table();
        if let Some(oldest) = choose(table.unfinished(), None) {
            table.cut(oldest.id, "gave way when file descriptors ran out");
        }
    }
}

/// Something that a client holds and may have to give up.
struct Holding {
    client: IpAddr,
    since: Instant,
    id: u64,
}

/// What [`choose`] has chosen.
struct Choice {
    since: Instant,
    id: u64,
    /// How many more its client holds than the newcomer would.
    lead: usize,
}

/// The oldest holding of the client that has most of them, the newcomer's
/// client counted with the one it wants.
fn choose(holdings: Vec<Holding>, newcomer: Option<IpAddr>) -> Option<Choice> {
    let mut held: HashMap<IpAddr, usize> = newcomer.map(|client| (client, 1)).into_iter().collect();
    for holding in &holdings {
        *held.entry(holding.client).or_default() += 1;
    }
    let own = newcomer.map_or(0, |client| held[&client]);
    holdings
        .into_iter()
        .max_by_key(|holding| (held[&holding.client], Reverse(holding.since)))
        .map(|Holding { client, since, id }| Choice {
            since,
            id,
            lead: held[&client].saturating_sub(own),
        })
}

impl Table {
    /// The connections that may be cut.
    fn unfinished(&self) -> Vec<Holding> {
        let holdings = self.entries.iter().filter_map(|(&id, entry)| {
            let client = entry.watch.client;
            let since = entry.watch.activity().unfinished_since()?;
            Some(Holding { client, since, id })
        });
        holdings.collect()
    }

    /// The scrapes whose answers are under way.
    fn scrapes(&self) -> Vec<Holding> {
        let mut holdings = Vec::new();
        for (&id, entry) in &self.entries {
            let client = entry.watch.client;
            let activity = entry.watch.activity();
            let scrapes = activity.scrapes_since();
            holdings.extend(scrapes.map(|since| Holding { client, since, id }));
        }
        holdings
    }

    fn cut(&mut self, id: u64, why: &str) {
        if let Some(entry) = self.entries.remove(&id) {
            log::debug!("connection from {} closed: {why}", entry.watch.client);
            // The connection may have ended this very moment; then nobody
            // listens any more, which is just as well.
            let _ = entry.cut.send(());
        }
    }
}

/// A place in the table; given back on drop.
#[derive(Debug)]
pub(crate) struct Slot {
    id: u64,
    connections: Arc<Connections>,
    /// Where stream and handler report.
    pub(crate) watch: Watch,
    /// Resolves when the connection has to end at once.
    pub(crate) order: oneshot::Receiver<()>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.connections.table().entries.remove(&self.id);
        self.connections.freed.notify_one();
    }
}

#[cfg(test)]
mod tests;
