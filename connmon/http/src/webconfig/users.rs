//! `basic_auth_users`: bcrypt, one at a time, verdicts remembered.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use ring::hmac;
use ring::rand::SystemRandom;
use tokio::sync::Semaphore;

/// Verdicts of each kind remembered. Refusals have their own list, so that
/// guessing cannot push out the verdict of who is let in.
const REMEMBERED: usize = 100;

/// Requests of one client address that may wait for bcrypt; more are told to
/// come back. Addresses are bounded by the server's connections.
const WAITING: usize = 16;

/// What a password for an unknown name is checked against: no password's
/// hash, at the cost that `htpasswd -C 10` and Go's default have, whatever the
/// users' hashes cost.
const UNKNOWN: &str = "$2b$10$abcdefghijklmnopqrstuu5Lo0g67CiD3M4RpN1BmBD4Crp5w7dbK";

/// The cost from which one check takes about a second or more.
const SLOW_COST: u32 = 14;

/// Whether credentials are good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Let in.
    Allowed,
    /// Wrong, missing or unreadable credentials.
    Refused,
    /// Too many of the same address wait.
    Busy,
}

/// Whether a password has a hash.
type Verify = dyn Fn(&[u8], &str) -> bool + Send + Sync;

/// Checks credentials against a list of users, which may change.
pub(super) struct Doorkeeper {
    /// Of this process alone: nothing of a password is kept, only its HMAC.
    secret: hmac::Key,
    remembered: Arc<Mutex<Remembered>>,
    turn: Arc<Semaphore>,
    /// By client address, so that no address has more than one place in the
    /// queue for the turn.
    queues: Arc<Mutex<HashMap<IpAddr, Queue>>>,
    /// bcrypt, counted by tests.
    verify: Arc<Verify>,
}

/// The requests of one address that wait, or whose password is checked.
struct Queue {
    requests: usize,
    first: Arc<Semaphore>,
}

/// A request's place in the queue of its client.
struct Place {
    queues: Arc<Mutex<HashMap<IpAddr, Queue>>>,
    client: IpAddr,
    first: Arc<Semaphore>,
}

impl Place {
    fn take(queues: &Arc<Mutex<HashMap<IpAddr, Queue>>>, client: IpAddr) -> Option<Self> {
        let mut all = lock(queues);
        let queue = all.entry(client).or_insert_with(|| Queue {
            requests: 0,
            first: Arc::new(Semaphore::new(1)),
        });
        if queue.requests >= WAITING {
            return None;
        }
        queue.requests += 1;
        Some(Self {
            queues: Arc::clone(queues),
            client,
            first: Arc::clone(&queue.first),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = lock(&self.queues);
        if let Some(queue) = all.get_mut(&self.client) {
            queue.requests -= 1;
            if queue.requests == 0 {
                all.remove(&self.client);
            }
        }
    }
}

#[derive(Default)]
struct Remembered {
    allowed: VecDeque<hmac::Tag>,
    refused: VecDeque<hmac::Tag>,
}

impl Remembered {
    fn push(&mut self, allowed: bool, tag: hmac::Tag) {
        let list = match allowed {
            true => &mut self.allowed,
            false => &mut self.refused,
        };
        if list.len() >= REMEMBERED {
            list.pop_front();
        }
        list.push_back(tag);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Doorkeeper {
    pub(super) fn new() -> Result<Self, String> {
        Self::with(Arc::new(verify))
    }

    fn with(verify: Arc<Verify>) -> Result<Self, String> {
        let secret = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())
            .map_err(|_| "no random numbers to be had".to_owned())?;
        Ok(Self {
            secret,
            remembered: Arc::default(),
            turn: Arc::new(Semaphore::new(1)),
            queues: Arc::default(),
            verify,
        })
    }

    /// Whether `headers` from `client` carry the credentials of one of
    /// `users`.
    pub(super) async fn check(
        &self,
        headers: &HeaderMap,
        users: &BTreeMap<String, String>,
        client: IpAddr,
    ) -> Verdict {
        let Some((name, password)) = credentials(headers) else {
            return Verdict::Refused;
        };
        let (hash, exists) = match users.get(&name) {
            Some(hash) => (hash.clone(), true),
            None => (UNKNOWN.to_owned(), false),
        };
        let tag = self.tag(&[name.as_bytes(), hash.as_bytes(), &password]);
        if let Some(verdict) = self.known(&tag) {
            return verdict;
        }
        let Some(place) = Place::take(&self.queues, client) else {
            return Verdict::Busy;
        };
        // First in the queue of its address, then in that of all addresses.
        let Ok(first) = Arc::clone(&place.first).acquire_owned().await else {
            return Verdict::Busy;
        };
        let Ok(turn) = Arc::clone(&self.turn).acquire_owned().await else {
            return Verdict::Busy;
        };
        // Someone before may have asked the same.
        if let Some(verdict) = self.known(&tag) {
            return verdict;
        }
        let verify = Arc::clone(&self.verify);
        let remembered = Arc::clone(&self.remembered);
        // On a thread of its own: it takes a tenth of a second and more. Nothing stops
        // it, so it keeps its turn, and what it found out, though the client
        // may hang up meanwhile.
        let checked = tokio::task::spawn_blocking(move || {
            // Whether the name exists or not.
            let matches = verify(&password, &hash);
            let allowed = exists && matches;
            lock(&remembered).push(allowed, tag);
            drop((turn, first, place));
            verdict(allowed)
        });
        checked.await.unwrap_or(Verdict::Refused)
    }

    fn known(&self, tag: &hmac::Tag) -> Option<Verdict> {
        let remembered = lock(&self.remembered);
        let among =
            |list: &VecDeque<hmac::Tag>| list.iter().any(|one| one.as_ref() == tag.as_ref());
        if among(&remembered.allowed) {
            return Some(Verdict::Allowed);
        }
        among(&remembered.refused).then_some(Verdict::Refused)
    }

    fn tag(&self, parts: &[&[u8]]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.secret);
        for part in parts {
            context.update(&part.len().to_le_bytes());
            context.update(part);
        }
        context.sign()
    }
}

fn verify(password: &[u8], hash: &str) -> bool {
    bcrypt::verify(password, hash).unwrap_or(false)
}

/// Whether bcrypt can verify a password against this hash; the reason to
/// change it if that takes long. The hash is in no message.
pub(super) fn check_hash(hash: &str) -> Result<Option<String>, &'static str> {
    if hash.len() < 60 {
        return Err("the hash is too short to be a bcrypted password");
    }
    let mut parts = hash.split('$');
    if !matches!(
        [parts.next(), parts.next()],
        [Some(""), Some("2a" | "2b" | "2x" | "2y")]
    ) {
        return Err("a bcrypt hash starts with $2a$, $2b$, $2x$ or $2y$");
    }
    let is_number = |cost: &&str| cost.len() == 2 && cost.bytes().all(|b| b.is_ascii_digit());
    let cost = parts.next().filter(is_number);
    let Some(cost @ 4..=31) = cost.and_then(|cost| cost.parse().ok()) else {
        return Err("the cost of a bcrypt hash is a number from 04 to 31");
    };
    // Salt and hash, in bcrypt's own base64.
    let rest = parts.next().unwrap_or_default();
    let in_alphabet = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'/');
    if rest.len() != 53 || !rest.bytes().all(in_alphabet) || parts.next().is_some() {
        return Err(
            "53 letters, digits, dots and slashes have to follow the cost, and nothing \
                    after them, not even a line break",
        );
    }
    let slow = cost >= SLOW_COST;
    Ok(slow.then(|| {
        format!(
            "a check of cost {cost} takes a second or more, during which no other password can be \
             checked; use a cost of 10 to 12"
        )
    }))
}

fn verdict(allowed: bool) -> Verdict {
    if allowed {
        Verdict::Allowed
    } else {
        Verdict::Refused
    }
}

/// Name and password of `Authorization: Basic` (RFC 7617); the latter in
/// whatever encoding.
fn credentials(headers: &HeaderMap) -> Option<(String, Vec<u8>)> {
    let value = headers.get(AUTHORIZATION)?.as_bytes();
    let (scheme, encoded) = value.split_at_checked(6)?;
    if !scheme.eq_ignore_ascii_case(b"basic ") {
        return None;
    }
    let decoded = STANDARD.decode(encoded).ok()?;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    let name = std::str::from_utf8(&decoded[..colon]).ok()?;
    Some((name.to_owned(), decoded[colon + 1..].to_vec()))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Cost 4, the cheapest there is.
    fn users() -> BTreeMap<String, String> {
        let hash = bcrypt::hash("right", 4).unwrap();
        [("alice".to_owned(), hash)].into()
    }

    fn client(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    fn authorization(text: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, text.parse().unwrap());
        headers
    }

    fn basic(credentials: &str) -> HeaderMap {
        authorization(&format!("Basic {}", STANDARD.encode(credentials)))
    }

    #[tokio::test]
    async fn only_the_right_password_of_a_user_opens() {
        let door = Doorkeeper::new().unwrap();
        let users = users();
        for round in 0..2 {
            for (credentials, expected) in [
                ("alice:right", Verdict::Allowed),
                ("alice:wrong", Verdict::Refused),
                ("alice:", Verdict::Refused),
                ("Alice:right", Verdict::Refused),
                ("bob:right", Verdict::Refused),
                ("alice", Verdict::Refused),
                (":right", Verdict::Refused),
            ] {
                let verdict = door.check(&basic(credentials), &users, client(1)).await;
                assert_eq!(verdict, expected, "{credentials} {round}");
            }
        }
        for other in ["Bearer x", "Basic", "Basic !!!", "Basic /w==", ""] {
            let verdict = door.check(&authorization(other), &users, client(1)).await;
            assert_eq!(verdict, Verdict::Refused, "{other}");
        }
        let lower = authorization(&format!("basic {}", STANDARD.encode("alice:right")));
        assert_eq!(
            door.check(&lower, &users, client(1)).await,
            Verdict::Allowed
        );
        assert_eq!(
            door.check(&HeaderMap::new(), &users, client(1)).await,
            Verdict::Refused
        );
        // A changed hash makes every old verdict void.
        let changed = [("alice".to_owned(), bcrypt::hash("new", 4).unwrap())].into();
        assert_eq!(
            door.check(&basic("alice:right"), &changed, client(1)).await,
            Verdict::Refused
        );
    }

    #[tokio::test]
    async fn guesses_are_forgotten_but_push_nobody_out() {
        let door = Doorkeeper::new().unwrap();
        let users = users();
        assert_eq!(
            door.check(&basic("alice:right"), &users, client(1)).await,
            Verdict::Allowed
        );
        for number in 0..REMEMBERED + 20 {
            door.check(&basic(&format!("alice:{number}")), &users, client(1))
                .await;
        }
        let remembered = lock(&door.remembered);
        assert_eq!(remembered.allowed.len(), 1);
        assert_eq!(remembered.refused.len(), REMEMBERED);
    }

    #[tokio::test]
    async fn an_address_with_too_many_requests_gets_busy() {
        let door = Arc::new(Doorkeeper::new().unwrap());
        let users = Arc::new(users());
        let verdicts = guess(&door, &users, &[1], 200).join_all().await;
        let busy = verdicts.iter().filter(|one| **one == Verdict::Busy).count();
        assert!(busy >= 200 - 2 * WAITING, "{busy}");
        assert!(!verdicts.contains(&Verdict::Allowed));
        assert!(lock(&door.queues).is_empty());
    }

    /// So many wrong passwords for alice from each address, all at once.
    fn guess(
        door: &Arc<Doorkeeper>,
        users: &Arc<BTreeMap<String, String>>,
        addresses: &[u8],
        count: usize,
    ) -> tokio::task::JoinSet<Verdict> {
        let mut guesses = tokio::task::JoinSet::new();
        for (number, last) in
            (0..count).flat_map(|number| addresses.iter().map(move |last| (number, *last)))
        {
            let (door, users) = (Arc::clone(door), Arc::clone(users));
            let wrong = basic(&format!("alice:{last} {number}"));
            guesses.spawn(async move { door.check(&wrong, &users, client(last)).await });
        }
        guesses
    }

    /// Ten addresses fill their queues; who comes from an eleventh waits for
    /// one check of each.
    #[tokio::test]
    async fn ten_guessing_addresses_starve_nobody() {
        let counts: Arc<[AtomicUsize; 2]> = Arc::default();
        let counting = Arc::clone(&counts);
        let door = Doorkeeper::with(Arc::new(move |password, _| {
            let [checks, open] = &*counting;
            while open.load(Ordering::SeqCst) == 0 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            checks.fetch_add(1, Ordering::SeqCst);
            password == b"right"
        }));
        let (door, users) = (Arc::new(door.unwrap()), Arc::new(users()));
        let addresses: Vec<u8> = (1..=10).collect();
        let guesses = guess(&door, &users, &addresses, WAITING);
        while lock(&door.queues)
            .values()
            .map(|queue| queue.requests)
            .sum::<usize>()
            < 10 * WAITING
        {
            tokio::task::yield_now().await;
        }
        counts[1].store(1, Ordering::SeqCst);
        let verdict = door.check(&basic("alice:right"), &users, client(11)).await;
        assert_eq!(verdict, Verdict::Allowed);
        let checks = counts[0].load(Ordering::SeqCst);
        assert!(checks <= addresses.len() + 2, "{checks}");
        drop(guesses);
    }

    /// A doorkeeper with how often it verified, and how many at once.
    fn counted() -> (Doorkeeper, Arc<[AtomicUsize; 3]>) {
        // All, in flight, most in flight.
        let counts: Arc<[AtomicUsize; 3]> = Arc::default();
        let counting = Arc::clone(&counts);
        let door = Doorkeeper::with(Arc::new(move |password, hash| {
            let [all, flying, most] = &*counting;
            all.fetch_add(1, Ordering::SeqCst);
            most.fetch_max(flying.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let verdict = verify(password, hash);
            flying.fetch_sub(1, Ordering::SeqCst);
            verdict
        }));
        (door.unwrap(), counts)
    }

    /// Each guess takes its turn at bcrypt, be there such a user or not, and
    /// nobody takes one twice.
    #[tokio::test]
    async fn unknown_names_take_their_turn() {
        let (door, counts) = counted();
        let users = users();
        for name in ["alice", "nobody"] {
            let before = counts[0].load(Ordering::SeqCst);
            for round in 0..5 {
                for _ in 0..2 {
                    let headers = basic(&format!("{name}:{round}"));
                    door.check(&headers, &users, client(1)).await;
                }
            }
            assert_eq!(counts[0].load(Ordering::SeqCst) - before, 5, "{name}");
        }
    }

    /// However expensive the users are.
    #[tokio::test]
    async fn unknown_names_have_a_fixed_cost() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let recorded = Arc::clone(&seen);
        let door = Doorkeeper::with(Arc::new(move |_, hash| {
            lock(&recorded).push(hash.to_owned());
            true
        }));
        let door = door.unwrap();
        let rest = UNKNOWN.strip_prefix("$2b$10$").unwrap();
        let users = [("alice".to_owned(), format!("$2b$31${rest}"))].into();
        for number in 0..20 {
            let headers = basic(&format!("nobody{number}:right"));
            let verdict = door.check(&headers, &users, client(1)).await;
            assert_eq!(verdict, Verdict::Refused);
        }
        assert_eq!(*lock(&seen), [UNKNOWN; 20]);
        assert_eq!(check_hash(UNKNOWN), Ok(None));
        assert_eq!(bcrypt::verify("right", UNKNOWN).ok(), Some(false));
    }

    #[tokio::test]
    async fn one_bcrypt_at_a_time() {
        let (door, counts) = counted();
        let (door, users) = (Arc::new(door), Arc::new(users()));
        guess(&door, &users, &[1, 2], WAITING).join_all().await;
        let counts = counts.each_ref().map(|count| count.load(Ordering::SeqCst));
        assert_eq!(counts, [2 * WAITING, 0, 1]);
    }

    /// Whoever hangs up while bcrypt runs gives no turn to the next, and the
    /// verdict is there when it is asked for again.
    #[tokio::test]
    async fn hanging_up_frees_no_turn_and_loses_no_verdict() {
        let (begun, begins) = std::sync::mpsc::sync_channel(16);
        let (go, gone) = std::sync::mpsc::sync_channel::<()>(16);
        let gone = Mutex::new(gone);
        let door = Doorkeeper::with(Arc::new(move |password, hash| {
            begun.send(()).unwrap();
            gone.lock().unwrap().recv().unwrap();
            verify(password, hash)
        }));
        let (door, users) = (door.unwrap(), users());
        let right = basic("alice:right");
        let wait = std::time::Duration::from_millis(50);
        assert!(
            tokio::time::timeout(wait, door.check(&right, &users, client(1)))
                .await
                .is_err()
        );
        begins.recv().unwrap();
        let next = basic("alice:wrong");
        assert!(
            tokio::time::timeout(wait, door.check(&next, &users, client(1)))
                .await
                .is_err()
        );
        assert!(begins.try_recv().is_err(), "two at once");
        go.send(()).unwrap();
        assert_eq!(
            door.check(&right, &users, client(1)).await,
            Verdict::Allowed
        );
        assert!(begins.try_recv().is_err(), "checked twice");
    }

    #[tokio::test]
    async fn a_hash_that_is_accepted_verifies() {
        let hash = bcrypt::hash("right", 4).unwrap();
        let rest = hash.strip_prefix("$2b$").unwrap();
        let door = Doorkeeper::new().unwrap();
        for version in ["2a", "2b", "2y", "2x"] {
            let hash = format!("${version}${rest}");
            assert_eq!(check_hash(&hash), Ok(None));
            let users = [("alice".to_owned(), hash)].into();
            let right = door.check(&basic("alice:right"), &users, client(1)).await;
            assert_eq!(right, Verdict::Allowed, "{version}");
            let wrong = door.check(&basic("alice:wrong"), &users, client(1)).await;
            assert_eq!(wrong, Verdict::Refused, "{version}");
        }
    }

    #[test]
    fn a_hash_that_never_matches_is_refused() {
        let good = bcrypt::hash("right", 4).unwrap();
        for bad in [
            format!("{good}\n"),
            format!("{good} "),
            format!(" {good}"),
            format!("{good}$"),
            good[..59].to_owned(),
            good.replace("$2b$", "$2c$"),
            good.replace("$2b$", "$2$"),
            good.replace("$04$", "$4$"),
            good.replace("$04$", "$+4$"),
            good.replace("$04$", "$03$"),
            good.replace("$04$", "$32$"),
            format!("{}-", &good[..59]),
            format!("{}é", &good[..58]),
        ] {
            assert!(check_hash(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_cost_of_a_second_is_named() {
        let cost = |cost| check_hash(&UNKNOWN.replace("$10$", &format!("${cost}$"))).unwrap();
        assert_eq!(cost(12), None);
        assert!(cost(14).unwrap().contains("cost 14"));
        assert!(cost(31).unwrap().contains("cost 31"));
    }
}
