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
mod tests {
    use tokio::sync::Semaphore;

    use super::*;

    fn limits() -> Limits {
        Limits {
            connections: 4,
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
        activity.handshaken(false, start + secs(1));
        // Silent or dribbling, the first header is due at the same time …
        assert_eq!(
            activity.deadline(&limits),
            Some(start + secs(1) + limits.header)
        );
        activity.bytes_read(start + secs(4));
        activity.bytes_read(start + secs(5));
        assert_eq!(
            activity.deadline(&limits),
            Some(start + secs(1) + limits.header)
        );
        // … nothing is due while we work …
        activity.handling += 1;
        assert_eq!(activity.deadline(&limits), None);
        activity.handling -= 1;
        // … the response is due as a whole, however the client dribbles …
        let response = activity.response_begins(start + secs(6), None);
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
        activity.bytes_read(start + secs(61));
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
        activity.handshaken(true, start);
        activity.bytes_read(start + secs(1));
        assert_eq!(activity.deadline(&limits), Some(start + limits.header));
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
        activity.handshaken(true, start);
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

    #[test]
    fn one_ipv6_network_is_one_client() {
        let client = |text: &str| client_of(text.parse().unwrap());
        for (one, other, same) in [
            ("2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff", true),
            ("2001:db8:1:2::1", "2001:db8:1:3::1", false),
            ("2001:db8::1", "2001:db9::1", false),
            ("::ffff:10.0.0.1", "10.0.0.1", true),
            ("::ffff:10.0.0.1", "::ffff:10.0.0.2", false),
            ("10.0.0.1", "10.0.0.2", false),
        ] {
            assert_eq!(client(one) == client(other), same, "{one} {other}");
        }
    }

    fn peer(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn is_cut(slot: &mut Slot) -> bool {
        slot.order.try_recv().is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn the_request_begun_first_gives_way() {
        let connections = Connections::new(Arc::new(limits()));
        let mut slots = Vec::new();
        for last in 1..=4 {
            let slot = connections.admit(peer(last)).await.unwrap();
            slot.watch.handshaken(false);
            slots.push(slot);
            tokio::time::advance(secs(1)).await;
        }
        // Bytes of a header that does not end make it no younger …
        slots[0].watch.bytes_read();
        let fifth = connections.admit(peer(5)).await.unwrap();
        assert!(is_cut(&mut slots[0]));
        // … and one that waits for our answer never gives way.
        let _working = slots[1].watch.work();
        let _sixth = connections.admit(peer(6)).await.unwrap();
        assert!(!is_cut(&mut slots[1]));
        assert!(is_cut(&mut slots[2]));
        drop(fifth);
        assert_eq!(connections.table().entries.len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn the_client_with_most_connections_gives_way() {
        let connections = Connections::new(Arc::new(limits()));
        let mut oldest = connections.admit(peer(9)).await.unwrap();
        tokio::time::advance(secs(100)).await;
        let mut network = Vec::new();
        for last in 1..=20 {
            let address = format!("2001:db8::{last}:1").parse().unwrap();
            network.push(connections.admit(address).await.unwrap());
        }
        let cut = network.iter_mut().map(is_cut).filter(|cut| *cut).count();
        assert_eq!(cut, 17, "three of one network's beside the other client");
        let mut second = connections.admit(peer(9)).await.unwrap();
        let mut third = connections.admit(peer(8)).await.unwrap();
        // Two clients had two each: the oldest of all four.
        assert!(is_cut(&mut oldest));
        assert!(!is_cut(&mut second) && !is_cut(&mut third));
    }

    #[tokio::test(start_paused = true)]
    async fn a_newcomer_has_time_to_send_its_request() {
        let limits = limits();
        let connections = Connections::new(Arc::new(limits.clone()));
        let mut slots = Vec::new();
        for _ in 0..4 {
            slots.push(connections.admit(peer(1)).await.unwrap());
        }
        let began = Instant::now();
        let _fifth = connections.admit(peer(1)).await.unwrap();
        assert!(began.elapsed() >= limits.fresh, "{:?}", began.elapsed());
    }

    /// Whose clients have one connection each, so that none has the most.
    #[tokio::test(start_paused = true)]
    async fn a_flood_from_many_addresses_leaves_time_for_a_request() {
        let connections = Connections::new(Arc::new(limits()));
        let mut flood = Vec::new();
        for last in 1..=4 {
            flood.push(connections.admit(peer(last)).await.unwrap());
        }
        let mut client = connections.admit(peer(200)).await.unwrap();
        let request = Instant::now() + Duration::from_millis(20);
        let endless = async {
            for last in (5..200).cycle() {
                flood.push(connections.admit(peer(last)).await.unwrap());
            }
        };
        assert!(tokio::time::timeout_at(request, endless).await.is_err());
        assert!(!is_cut(&mut client));
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_given_back_is_taken_at_once() {
        let limits = limits();
        let connections = Connections::new(Arc::new(limits.clone()));
        let mut slots = Vec::new();
        for last in 1..=4 {
            slots.push(connections.admit(peer(last)).await.unwrap());
        }
        let began = Instant::now();
        let give_back = async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            slots.pop();
        };
        let (newcomer, ()) = tokio::join!(connections.admit(peer(5)), give_back);
        assert!(newcomer.is_some());
        assert!(began.elapsed() < limits.fresh, "{:?}", began.elapsed());
        assert!(!slots.iter_mut().any(is_cut));
    }

    #[tokio::test(start_paused = true)]
    async fn full_of_work_is_full() {
        let connections = Connections::new(Arc::new(limits()));
        let mut slots = Vec::new();
        for last in 1..=4 {
            slots.push(connections.admit(peer(last)).await.unwrap());
        }
        let _handling: Vec<Handling> = slots.iter().map(|slot| slot.watch.request()).collect();
        let _working: Vec<Working> = slots.iter().map(|slot| slot.watch.work()).collect();
        tokio::time::advance(secs(100)).await;
        assert!(connections.admit(peer(5)).await.is_none());
        connections.cut_overdue();
        assert_eq!(connections.table().entries.len(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn the_client_with_most_slow_readers_gives_way() {
        let limits = limits();
        let connections = Connections::new(Arc::new(limits.clone()));
        let permits = Arc::new(Semaphore::new(3));
        let mut readers = Vec::new();
        for last in [1, 2, 2] {
            let slot = connections.admit(peer(last)).await.unwrap();
            let permit = Arc::clone(&permits).try_acquire_owned().unwrap();
            let responding = slot.watch.response(Some(permit));
            readers.push((slot, responding));
            tokio::time::advance(limits.fresh).await;
        }
        // Each would have two then: there is no one to blame yet.
        assert!(!connections.cut_slow_reader(peer(1)));
        // Another would have one, and the second client has two.
        assert!(connections.cut_slow_reader(peer(3)));
        assert!(is_cut(&mut readers[1].0));
        // Now everyone would have one.
        assert!(!connections.cut_slow_reader(peer(3)));
        tokio::time::advance(limits.slow_reader).await;
        assert!(connections.cut_slow_reader(peer(3)));
        assert!(is_cut(&mut readers[0].0));
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
        assert_eq!(activity.scrapes_since().count(), 2);
        activity.flushed(now);
        assert_eq!(permits.available_permits(), 1);
        activity.response_ends(second);
        // Cut before that.
        drop(activity);
        assert_eq!(permits.available_permits(), 2);
        // A file of the page is none.
        let mut activity = Activity::new(now);
        activity.response_begins(now, None);
        assert_eq!(activity.scrapes_since().count(), 0);
        assert_eq!(activity.response_since(), Some(now));
    }
}
