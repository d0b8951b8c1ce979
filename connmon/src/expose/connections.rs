//! Who is connected, since when idle, and who gives way when it is full.
//!
//! [`Activity`] is the pure part: what one connection is doing, told by the
//! stream, the handler and the response body, and until when it may go on.
//! [`Connections`] is the bounded table of them.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use super::limits::Limits;

/// What a connection is doing. Time is a parameter of every method.
#[derive(Debug)]
pub(crate) struct Activity {
    opened: Instant,
    /// End of the TLS handshake; at once without TLS.
    handshaken: Option<Instant>,
    /// HTTP/2: bytes do not mean that a request has begun.
    multiplexed: bool,
    /// First byte of a request whose header is not complete.
    header_since: Option<Instant>,
    /// Requests with the handler.
    handling: usize,
    /// Of those, the ones past authentication: we keep the client waiting,
    /// not the client us.
    working: usize,
    /// Responses not handed to the stream completely, in order; HTTP/2 has
    /// several, at most one a stream.
    responses: BTreeMap<u64, Response>,
    next_response: u64,
    /// Start of the oldest one handed over whose end is not flushed yet.
    unflushed: Option<Instant>,
    /// Those among them that are scrapes, in no order; as many as there are
    /// permits.
    scrapes: Vec<Response>,
    /// End of the last response.
    idle_since: Option<Instant>,
    /// Last byte in either direction.
    progress: Instant,
}

/// An answer on its way.
#[derive(Debug)]
struct Response {
    began: Instant,
    /// Its place among the scrapes in flight, where it is one.
    permit: Option<OwnedSemaphorePermit>,
}

impl Activity {
    fn new(now: Instant) -> Self {
        Self {
            opened: now,
            handshaken: None,
            multiplexed: false,
            header_since: None,
            handling: 0,
            working: 0,
            responses: BTreeMap::new(),
            next_response: 0,
            unflushed: None,
            scrapes: Vec::new(),
            idle_since: None,
            progress: now,
        }
    }

    fn bytes_read(&mut self, now: Instant) {
        self.progress = now;
        if self.handling == 0 && self.response_since().is_none() {
            self.header_since.get_or_insert(now);
        }
    }

    fn bytes_written(&mut self, now: Instant) {
        self.progress = now;
    }

    fn flushed(&mut self, now: Instant) {
        self.scrapes.clear();
        if self.unflushed.take().is_some() && self.responses.is_empty() {
            self.idle_since = Some(now);
        }
    }

    fn request_begins(&mut self) {
        self.header_since = None;
        self.handling += 1;
    }

    fn response_begins(&mut self, now: Instant, permit: Option<OwnedSemaphorePermit>) -> u64 {
        let id = self.next_response;
        self.next_response += 1;
        let response = Response { began: now, permit };
        self.responses.insert(id, response);
        id
    }

    fn response_ends(&mut self, id: u64) {
        let Some(response) = self.responses.remove(&id) else {
            return;
        };
        let began = response.began;
        self.unflushed = Some(self.unflushed.map_or(began, |before| before.min(began)));
        if response.permit.is_some() {
            self.scrapes.push(response);
        }
    }

    /// Start of the oldest response under way. Each has its own time: over
    /// HTTP/2 a new one may begin before the last has ended, for ever.
    fn response_since(&self) -> Option<Instant> {
        let oldest = self.responses.values().next();
        let began = oldest.map(|response| response.began);
        began.into_iter().chain(self.unflushed).min()
    }

    /// Start of the oldest scrape in flight.
    fn scrape_since(&self) -> Option<Instant> {
        let responses = self.responses.values().chain(&self.scrapes);
        let scrapes = responses.filter(|response| response.permit.is_some());
        scrapes.map(|response| response.began).min()
    }

    /// When the connection has to be cut unless it gets on; `None` while the
    /// next step is ours.
    fn deadline(&self, limits: &Limits) -> Option<Instant> {
        if let Some(since) = self.response_since() {
            return Some(since + limits.write);
        }
        if self.handling > 0 {
            return None;
        }
        let Some(handshaken) = self.handshaken else {
            return Some(self.opened + limits.handshake);
        };
        match (self.header_since, self.idle_since) {
            (Some(since), _) if !self.multiplexed => Some(since + limits.header),
            (_, Some(since)) => Some(since + limits.idle),
            (_, None) => Some(handshaken + limits.header),
        }
    }

    /// Since when the client has given no sign of life; `None` while it is
    /// us who keep it waiting.
    fn silent_since(&self) -> Option<Instant> {
        (self.working == 0).then_some(self.progress)
    }
}

/// A connection's [`Activity`], shared by those who report to it.
#[derive(Clone, Debug)]
pub(crate) struct Watch(Arc<Mutex<Activity>>);

impl Watch {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Activity::new(Instant::now()))))
    }

    fn activity(&self) -> MutexGuard<'_, Activity> {
        // Every change is complete in itself, so a panic elsewhere while the
        // lock was held has left nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn handshaken(&self, multiplexed: bool) {
        let mut activity = self.activity();
        activity.handshaken = Some(Instant::now());
        activity.multiplexed = multiplexed;
        activity.header_since = None;
    }

    pub(crate) fn bytes_read(&self) {
        self.activity().bytes_read(Instant::now());
    }

    pub(crate) fn bytes_written(&self) {
        self.activity().bytes_written(Instant::now());
    }

    pub(crate) fn flushed(&self) {
        self.activity().flushed(Instant::now());
    }

    /// A header is complete; hold the guard while the request is handled.
    pub(crate) fn request(&self) -> Handling {
        self.activity().request_begins();
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

/// Resolves when the connection has to end at once.
pub(crate) type Cut = oneshot::Receiver<&'static str>;

/// The connections being served, at most [`Limits::connections`].
#[derive(Debug)]
pub(crate) struct Connections {
    limits: Arc<Limits>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    entries: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    peer: IpAddr,
    watch: Watch,
    cut: oneshot::Sender<&'static str>,
}

/// What becomes of a newcomer.
#[derive(Debug)]
pub(crate) enum Admission {
    /// There is room, if need be made by cutting another.
    Admitted(Slot),
    /// Nobody has been idle long enough to give way before this instant.
    Wait(Instant),
    /// Everybody waits for an answer of ours.
    Full,
}

impl Connections {
    pub(crate) fn new(limits: Arc<Limits>) -> Arc<Self> {
        Arc::new(Self {
            limits,
            table: Mutex::default(),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection from `peer`. With `press`, whoever is idle
    /// longest gives way however short that is.
    pub(crate) fn admit(self: &Arc<Self>, peer: IpAddr, press: bool) -> Admission {
        let peer = peer.to_canonical();
        let mut table = self.table();
        let of_peer = table.entries.values().filter(|entry| entry.peer == peer);
        let peer_full = of_peer.count() >= self.limits.connections_per_peer;
        if peer_full || table.entries.len() >= self.limits.connections {
            let longest = table
                .entries
                .iter()
                .filter(|(_, entry)| !peer_full || entry.peer == peer)
                .filter_map(|(id, entry)| Some((entry.watch.activity().silent_since()?, *id)))
                .min();
            let Some((since, id)) = longest else {
                return Admission::Full;
            };
            let ripe = since + self.limits.fresh;
            if !press && ripe > Instant::now() {
                return Admission::Wait(ripe);
            }
            table.cut(id, "idle longest when another client came");
        }
        let id = table.next;
        table.next += 1;
        let watch = Watch::new();
        let (cut, order) = oneshot::channel();
        let entry = Entry {
            peer,
            watch: watch.clone(),
            cut,
        };
        table.entries.insert(id, entry);
        Admission::Admitted(Slot {
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

    /// Cuts the connection whose scrape is in flight longest, if that is long
    /// enough ([`Limits::slow_reader`]).
    pub(crate) fn cut_slowest_reader(&self) -> bool {
        let mut table = self.table();
        let slowest = table
            .entries
            .iter()
            .filter_map(|(id, entry)| Some((entry.watch.activity().scrape_since()?, *id)))
            .min();
        match slowest {
            Some((since, id)) if since.elapsed() >= self.limits.slow_reader => {
                table.cut(id, "slowest reader when another scrape came");
                true
            }
            _ => false,
        }
    }

    /// Cuts the connection idle longest to free a file descriptor.
    pub(crate) fn cut_idlest(&self) {
        let mut table = self.table();
        let longest = table
            .entries
            .iter()
            .filter_map(|(id, entry)| Some((entry.watch.activity().silent_since()?, *id)))
            .min();
        if let Some((_, id)) = longest {
            table.cut(id, "idle longest when file descriptors ran out");
        }
    }
}

impl Table {
    fn cut(&mut self, id: u64, why: &'static str) {
        if let Some(entry) = self.entries.remove(&id) {
            log::debug!("connection from {} closed: {why}", entry.peer);
            // The connection may have ended this very moment; then nobody
            // listens any more, which is just as well.
            let _ = entry.cut.send(why);
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
    /// When to stop.
    pub(crate) order: Cut,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.connections.table().entries.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::Semaphore;

    use super::*;

    fn limits() -> Limits {
        Limits {
            connections: 4,
            connections_per_peer: 3,
            ..Limits::default()
        }
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn deadlines_follow_what_the_connection_does() {
        let limits = limits();
        let start = Instant::now();
        let mut activity = Activity::new(start);
        assert_eq!(activity.deadline(&limits), Some(start + limits.handshake));
        activity.handshaken = Some(start + secs(1));
        // Silent or dribbling, the first header is due at the same time …
        assert_eq!(
            activity.deadline(&limits),
            Some(start + secs(1) + limits.header)
        );
        activity.bytes_read(start + secs(1));
        activity.bytes_read(start + secs(5));
        assert_eq!(
            activity.deadline(&limits),
            Some(start + secs(1) + limits.header)
        );
        // … nothing is due while we work …
        activity.request_begins();
        assert_eq!(activity.deadline(&limits), None);
        activity.handling -= 1;
        // … the response is due as a whole, however the client dribbles …
        let response = activity.response_begins(start + secs(6), None);
        activity.bytes_written(start + secs(20));
        activity.flushed(start + secs(20));
        assert_eq!(
            activity.deadline(&limits),
            Some(start + secs(6) + limits.write)
        );
        // … also what the body has given but the socket has not taken …
        activity.response_ends(response);
        assert_eq!(
            activity.deadline(&limits),
            Some(start + secs(6) + limits.write)
        );
        // … then it may idle, until the first byte of the next request.
        activity.flushed(start + secs(21));
        assert_eq!(
            activity.deadline(&limits),
            Some(start + secs(21) + limits.idle)
        );
        activity.bytes_read(start + secs(60));
        assert_eq!(
            activity.deadline(&limits),
            Some(start + secs(60) + limits.header)
        );
    }

    #[test]
    fn http2_frames_are_not_requests() {
        let limits = limits();
        let start = Instant::now();
        let mut activity = Activity::new(start);
        activity.handshaken = Some(start);
        activity.multiplexed = true;
        activity.bytes_read(start + secs(1));
        assert_eq!(activity.deadline(&limits), Some(start + limits.header));
        activity.request_begins();
        activity.handling -= 1;
        let response = activity.response_begins(start + secs(2), None);
        activity.response_ends(response);
        activity.flushed(start + secs(2));
        activity.bytes_read(start + secs(3));
        assert_eq!(
            activity.deadline(&limits),
            Some(start + secs(2) + limits.idle)
        );
    }

    /// A client that always has a response under way, each of them fast.
    #[test]
    fn overlapping_responses_have_a_time_each() {
        let limits = limits();
        let start = Instant::now();
        let mut activity = Activity::new(start);
        activity.handshaken = Some(start);
        activity.multiplexed = true;
        let mut last = activity.response_begins(start, None);
        for second in 1..600 {
            let now = start + secs(second);
            let next = activity.response_begins(now, None);
            activity.response_ends(last);
            activity.flushed(now);
            assert_eq!(activity.deadline(&limits), Some(now + limits.write));
            last = next;
        }
        // One that is not taken has no more than its own time.
        let stuck = start + secs(600);
        activity.response_ends(last);
        activity.flushed(stuck);
        let _unread = activity.response_begins(stuck, None);
        for second in 601..620 {
            let other = activity.response_begins(start + secs(second), None);
            activity.response_ends(other);
            activity.flushed(start + secs(second));
        }
        assert_eq!(activity.deadline(&limits), Some(stuck + limits.write));
    }

    fn peer(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn admitted(admission: Admission) -> Slot {
        match admission {
            Admission::Admitted(slot) => slot,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_one_idle_longest_gives_way() {
        let limits = Arc::new(limits());
        let connections = Connections::new(Arc::clone(&limits));
        let mut slots = Vec::new();
        for last in [1, 1, 2, 3] {
            slots.push(admitted(connections.admit(peer(last), false)));
            tokio::time::advance(secs(1)).await;
        }
        // The first is silent longest, but a sign of life …
        slots[0].watch.bytes_read();
        tokio::time::advance(secs(1)).await;
        let newcomer = admitted(connections.admit(peer(4), false));
        assert!(slots[1].order.try_recv().is_ok());
        assert!(slots[0].order.try_recv().is_err());
        // … and one that waits for our answer never gives way.
        let _working = slots[2].watch.work();
        tokio::time::advance(secs(1)).await;
        let _another = admitted(connections.admit(peer(4), false));
        assert!(slots[2].order.try_recv().is_err());
        assert!(slots[3].order.try_recv().is_ok());
        drop(newcomer);
        assert_eq!(connections.table().entries.len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_at_its_limit_displaces_only_itself() {
        let limits = Arc::new(limits());
        let connections = Connections::new(Arc::clone(&limits));
        let mut other = admitted(connections.admit(peer(9), false));
        tokio::time::advance(secs(100)).await;
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
        let mut first = admitted(connections.admit(mapped, false));
        let _second = admitted(connections.admit(peer(1), false));
        let _third = admitted(connections.admit(mapped, false));
        let Admission::Wait(ripe) = connections.admit(peer(1), false) else {
            panic!("nobody is idle long enough yet");
        };
        tokio::time::sleep_until(ripe).await;
        let _fourth = admitted(connections.admit(peer(1), false));
        assert!(first.order.try_recv().is_ok());
        assert!(other.order.try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn full_of_work_is_full() {
        let limits = Arc::new(limits());
        let connections = Connections::new(Arc::clone(&limits));
        let slots: Vec<Slot> = (1..=4)
            .map(|last| admitted(connections.admit(peer(last), false)))
            .collect();
        let _handling: Vec<Handling> = slots.iter().map(|slot| slot.watch.request()).collect();
        let _working: Vec<Working> = slots.iter().map(|slot| slot.watch.work()).collect();
        tokio::time::advance(secs(100)).await;
        assert!(matches!(connections.admit(peer(5), true), Admission::Full));
        connections.cut_overdue();
        assert_eq!(connections.table().entries.len(), 4);
    }

    #[test]
    fn a_scrape_is_in_flight_until_its_end_is_flushed() {
        let permits = Arc::new(Semaphore::new(2));
        let permit = || Some(Arc::clone(&permits).try_acquire_owned().unwrap());
        let now = Instant::now();
        let mut activity = Activity::new(now);
        let (first, second) = (
            activity.response_begins(now, permit()),
            activity.response_begins(now, permit()),
        );
        activity.response_ends(first);
        assert_eq!(permits.available_permits(), 0);
        assert_eq!(activity.scrape_since(), Some(now));
        activity.flushed(now);
        assert_eq!(permits.available_permits(), 1);
        activity.response_ends(second);
        // Cut before that.
        drop(activity);
        assert_eq!(permits.available_permits(), 2);
        // A file of the page is none.
        let mut activity = Activity::new(now);
        activity.response_begins(now, None);
        assert_eq!(activity.scrape_since(), None);
        assert_eq!(activity.response_since(), Some(now));
    }
}
