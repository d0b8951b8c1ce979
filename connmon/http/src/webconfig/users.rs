//! `basic_auth_users`: passwords are checked with bcrypt, one at a time, and
//! the outcomes are remembered.
//!
//! A check takes a tenth of a second and more, so whoever guesses passwords
//! must not keep others waiting: every client address has one place in the
//! queue for the check.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use ring::hmac;
use ring::rand::SystemRandom;

use crate::lock;

/// Outcomes of each kind remembered. Refusals have their own list, so that
/// guesses cannot displace an accepted password.
const REMEMBERED: usize = 100;

/// Requests of one client address that may wait for bcrypt; more get 503. The
/// number of addresses is bounded by the server's connections.
const WAITING: usize = 16;

/// The hash that a password for an unknown name is checked against. No
/// password matches it, and it costs as much as the default of Go and of
/// `htpasswd -C 10`, whatever the users' hashes cost.
const UNKNOWN: &str = "$2b$10$abcdefghijklmnopqrstuu5Lo0g67CiD3M4RpN1BmBD4Crp5w7dbK";

/// Whether a request is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Allowed,
    /// 401: wrong, missing or unreadable credentials.
    Unauthorized,
    /// 503: too many requests of the same address wait for bcrypt.
    Busy,
    /// 429: above `rate_limit`.
    RateLimited,
}

/// Whether a password has a hash.
type Verify = dyn Fn(&[u8], &str) -> bool + Send + Sync;

/// A first come, first served queue: whoever holds the lock is checked.
type Queue = Arc<tokio::sync::Mutex<()>>;

/// Checks credentials against a list of users, which may change.
pub(super) struct BasicAuth {
    /// Of this process alone: nothing of a password is kept, only its HMAC.
    secret: hmac::Key,
    /// Refused, then allowed.
    remembered: Arc<Mutex<[VecDeque<hmac::Tag>; 2]>>,
    /// The first requests of all addresses.
    all: Queue,
    /// The requests of each client address, one reference for each.
    queues: Mutex<HashMap<IpAddr, Queue>>,
    /// bcrypt, replaced in tests.
    verify: Arc<Verify>,
}

impl BasicAuth {
    pub(super) fn new() -> Result<Self, String> {
        Self::with(Arc::new(verify))
    }

    fn with(verify: Arc<Verify>) -> Result<Self, String> {
        let secret = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new());
        Ok(Self {
            secret: secret.map_err(|_| "the kernel gives no random numbers".to_owned())?,
            remembered: Arc::default(),
            all: Arc::default(),
            queues: Mutex::default(),
            verify,
        })
    }

    /// Whether `headers` from `client` have the credentials of one of `users`
    /// (name → hash).
    pub(super) async fn check(
        &self,
        headers: &HeaderMap,
        users: &BTreeMap<String, String>,
        client: IpAddr,
    ) -> Access {
        let Some((name, password)) = credentials(headers) else {
            return Access::Unauthorized;
        };
        let known = users.get(&name);
        let hash = known.map_or(UNKNOWN, String::as_str).to_owned();
        let exists = known.is_some();
        let tag = self.tag(&[name.as_bytes(), hash.as_bytes(), &password]);
        if let Some(access) = self.recall(&tag) {
            return access;
        }
        let Some(queue) = self.queue(client) else {
            return Access::Busy;
        };
        let first = queue.lock_owned().await;
        let turn = Arc::clone(&self.all).lock_owned().await;
        // An earlier request may have had the same credentials.
        if let Some(access) = self.recall(&tag) {
            return access;
        }
        let verify = Arc::clone(&self.verify);
        let remembered = Arc::clone(&self.remembered);
        // The client may disconnect meanwhile: bcrypt runs to its end, so it
        // keeps its place, and its outcome is remembered.
        let checked = tokio::task::spawn_blocking(move || {
            // Always, so that an unknown name takes as long.
            let matches = verify(&password, &hash);
            let allowed = exists && matches;
            let list = &mut lock(&remembered)[usize::from(allowed)];
            list.truncate(REMEMBERED - 1);
            list.push_front(tag);
            drop((turn, first));
            access(allowed)
        });
        checked.await.unwrap_or(Access::Unauthorized)
    }

    /// The queue of `client`, unless it is full.
    fn queue(&self, client: IpAddr) -> Option<Queue> {
        let mut queues = lock(&self.queues);
        queues.retain(|_, queue| Arc::strong_count(queue) > 1);
        let queue = queues.entry(client).or_default();
        (Arc::strong_count(queue) <= WAITING).then(|| Arc::clone(queue))
    }

    fn recall(&self, tag: &hmac::Tag) -> Option<Access> {
        let lists = lock(&self.remembered);
        let has = |list: &VecDeque<hmac::Tag>| list.iter().any(|it| it.as_ref() == tag.as_ref());
        let place = lists.iter().position(has)?;
        Some(access(place == 1))
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

fn access(allowed: bool) -> Access {
    if allowed {
        Access::Allowed
    } else {
        Access::Unauthorized
    }
}

/// The cost of a hash that bcrypt can verify a password against.
///
/// # Errors
/// Why it cannot. The hash is in no message.
pub(super) fn cost_of(hash: &str) -> Result<u32, &'static str> {
    if hash.len() < 60 {
        return Err("the hash is too short to be a bcrypted password");
    }
    let [b'$', b'2', b'a' | b'b' | b'x' | b'y', b'$', rest @ ..] = hash.as_bytes() else {
        return Err("a bcrypt hash starts with $2a$, $2b$, $2x$ or $2y$");
    };
    let (cost, rest) = match rest {
        [tens @ b'0'..=b'3', ones @ b'0'..=b'9', b'$', rest @ ..] => {
            (u32::from(tens - b'0') * 10 + u32::from(ones - b'0'), rest)
        }
        rest => (0, rest),
    };
    if !(4..=31).contains(&cost) {
        return Err("the cost of a bcrypt hash is a number from 04 to 31");
    }
    // Salt and hash, in bcrypt's own base64.
    let in_alphabet = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'/');
    if rest.len() != 53 || !rest.iter().all(in_alphabet) {
        return Err(
            "53 letters, digits, dots and slashes have to follow the cost, and nothing \
                    after them, not even a line break",
        );
    }
    Ok(cost)
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
        let auth = BasicAuth::new().unwrap();
        let users = users();
        for round in 0..2 {
            for (credentials, expected) in [
                ("alice:right", Access::Allowed),
                ("alice:wrong", Access::Unauthorized),
                ("alice:", Access::Unauthorized),
                ("Alice:right", Access::Unauthorized),
                ("bob:right", Access::Unauthorized),
                ("alice", Access::Unauthorized),
                (":right", Access::Unauthorized),
            ] {
                let access = auth.check(&basic(credentials), &users, client(1)).await;
                assert_eq!(access, expected, "{credentials} {round}");
            }
        }
        for other in ["Bearer x", "Basic", "Basic !!!", "Basic /w==", ""] {
            let access = auth.check(&authorization(other), &users, client(1)).await;
            assert_eq!(access, Access::Unauthorized, "{other}");
        }
        let lower = authorization(&format!("basic {}", STANDARD.encode("alice:right")));
        assert_eq!(auth.check(&lower, &users, client(1)).await, Access::Allowed);
        assert_eq!(
            auth.check(&HeaderMap::new(), &users, client(1)).await,
            Access::Unauthorized
        );
        // A changed hash makes every old outcome void.
        let changed = [("alice".to_owned(), bcrypt::hash("new", 4).unwrap())].into();
        assert_eq!(
            auth.check(&basic("alice:right"), &changed, client(1)).await,
            Access::Unauthorized
        );
    }

    #[tokio::test]
    async fn guesses_are_forgotten_but_push_nobody_out() {
        let auth = BasicAuth::new().unwrap();
        let users = users();
        assert_eq!(
            auth.check(&basic("alice:right"), &users, client(1)).await,
            Access::Allowed
        );
        for number in 0..REMEMBERED + 20 {
            auth.check(&basic(&format!("alice:{number}")), &users, client(1))
                .await;
        }
        let remembered = lock(&auth.remembered);
        let lengths = remembered.each_ref().map(VecDeque::len);
        assert_eq!(lengths, [REMEMBERED, 1]);
    }

    #[tokio::test]
    async fn an_address_with_too_many_requests_gets_busy() {
        let auth = Arc::new(BasicAuth::new().unwrap());
        let users = Arc::new(users());
        let outcomes = guess(&auth, &users, &[1], 200).join_all().await;
        let busy = outcomes.iter().filter(|one| **one == Access::Busy).count();
        assert!(busy >= 200 - 2 * WAITING, "{busy}");
        assert!(!outcomes.contains(&Access::Allowed));
        assert_eq!(waiting(&auth), 0);
    }

    /// Requests in all queues.
    fn waiting(auth: &BasicAuth) -> usize {
        let queues = lock(&auth.queues);
        let requests = queues.values().map(|queue| Arc::strong_count(queue) - 1);
        requests.sum()
    }

    /// So many wrong passwords for alice from each address, all at once.
    fn guess(
        auth: &Arc<BasicAuth>,
        users: &Arc<BTreeMap<String, String>>,
        addresses: &[u8],
        count: usize,
    ) -> tokio::task::JoinSet<Access> {
        let mut guesses = tokio::task::JoinSet::new();
        for (number, last) in
            (0..count).flat_map(|number| addresses.iter().map(move |last| (number, *last)))
        {
            let (auth, users) = (Arc::clone(auth), Arc::clone(users));
            let wrong = basic(&format!("alice:{last} {number}"));
            guesses.spawn(async move { auth.check(&wrong, &users, client(last)).await });
        }
        guesses
    }

    /// Ten addresses fill their queues; who comes from an eleventh waits for
    /// one check of each.
    #[tokio::test]
    async fn ten_guessing_addresses_starve_nobody() {
        let counts: Arc<[AtomicUsize; 2]> = Arc::default();
        let counting = Arc::clone(&counts);
        let auth = BasicAuth::with(Arc::new(move |password, _| {
            let [checks, open] = &*counting;
            while open.load(Ordering::SeqCst) == 0 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            checks.fetch_add(1, Ordering::SeqCst);
            password == b"right"
        }));
        let (auth, users) = (Arc::new(auth.unwrap()), Arc::new(users()));
        let addresses: Vec<u8> = (1..=10).collect();
        let guesses = guess(&auth, &users, &addresses, WAITING);
        while waiting(&auth) < 10 * WAITING {
            tokio::task::yield_now().await;
        }
        counts[1].store(1, Ordering::SeqCst);
        let access = auth.check(&basic("alice:right"), &users, client(11)).await;
        assert_eq!(access, Access::Allowed);
        let checks = counts[0].load(Ordering::SeqCst);
        assert!(checks <= addresses.len() + 2, "{checks}");
        drop(guesses);
    }

    /// A authkeeper with how often it verified, and how many at once.
    fn counted() -> (BasicAuth, Arc<[AtomicUsize; 3]>) {
        // All, in flight, most in flight.
        let counts: Arc<[AtomicUsize; 3]> = Arc::default();
        let counting = Arc::clone(&counts);
        let auth = BasicAuth::with(Arc::new(move |password, hash| {
            let [all, flying, most] = &*counting;
            all.fetch_add(1, Ordering::SeqCst);
            most.fetch_max(flying.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let access = verify(password, hash);
            flying.fetch_sub(1, Ordering::SeqCst);
            access
        }));
        (auth.unwrap(), counts)
    }

    /// Each guess takes its turn at bcrypt, be there such a user or not, and
    /// nobody takes one twice.
    #[tokio::test]
    async fn unknown_names_take_their_turn() {
        let (auth, counts) = counted();
        let users = users();
        for name in ["alice", "nobody"] {
            let before = counts[0].load(Ordering::SeqCst);
            for round in 0..5 {
                for _ in 0..2 {
                    let headers = basic(&format!("{name}:{round}"));
                    auth.check(&headers, &users, client(1)).await;
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
        let auth = BasicAuth::with(Arc::new(move |_, hash| {
            lock(&recorded).push(hash.to_owned());
            true
        }));
        let auth = auth.unwrap();
        let rest = UNKNOWN.strip_prefix("$2b$10$").unwrap();
        let users = [("alice".to_owned(), format!("$2b$31${rest}"))].into();
        for number in 0..20 {
            let headers = basic(&format!("nobody{number}:right"));
            let access = auth.check(&headers, &users, client(1)).await;
            assert_eq!(access, Access::Unauthorized);
        }
        assert_eq!(*lock(&seen), [UNKNOWN; 20]);
        assert_eq!(cost_of(UNKNOWN), Ok(10));
        assert_eq!(bcrypt::verify("right", UNKNOWN).ok(), Some(false));
    }

    #[tokio::test]
    async fn one_bcrypt_at_a_time() {
        let (auth, counts) = counted();
        let (auth, users) = (Arc::new(auth), Arc::new(users()));
        guess(&auth, &users, &[1, 2], WAITING).join_all().await;
        let counts = counts.each_ref().map(|count| count.load(Ordering::SeqCst));
        assert_eq!(counts, [2 * WAITING, 0, 1]);
    }

    /// Whoever hangs up while bcrypt runs gives no turn to the next, and the
    /// outcome is there for the next request.
    #[tokio::test]
    async fn a_disconnect_frees_no_turn_and_keeps_the_outcome() {
        let (begun, begins) = std::sync::mpsc::sync_channel(16);
        let (go, gone) = std::sync::mpsc::sync_channel::<()>(16);
        let gone = Mutex::new(gone);
        let auth = BasicAuth::with(Arc::new(move |password, hash| {
            begun.send(()).unwrap();
            gone.lock().unwrap().recv().unwrap();
            verify(password, hash)
        }));
        let (auth, users) = (auth.unwrap(), users());
        let right = basic("alice:right");
        let wait = std::time::Duration::from_millis(50);
        assert!(
            tokio::time::timeout(wait, auth.check(&right, &users, client(1)))
                .await
                .is_err()
        );
        begins.recv().unwrap();
        let next = basic("alice:wrong");
        assert!(
            tokio::time::timeout(wait, auth.check(&next, &users, client(1)))
                .await
                .is_err()
        );
        assert!(begins.try_recv().is_err(), "two at once");
        go.send(()).unwrap();
        assert_eq!(auth.check(&right, &users, client(1)).await, Access::Allowed);
        assert!(begins.try_recv().is_err(), "checked twice");
    }

    #[tokio::test]
    async fn a_hash_that_is_accepted_verifies() {
        let hash = bcrypt::hash("right", 4).unwrap();
        let rest = hash.strip_prefix("$2b$").unwrap();
        let auth = BasicAuth::new().unwrap();
        for version in ["2a", "2b", "2y", "2x"] {
            let hash = format!("${version}${rest}");
            assert_eq!(cost_of(&hash), Ok(4));
            let users = [("alice".to_owned(), hash)].into();
            let right = auth.check(&basic("alice:right"), &users, client(1)).await;
            assert_eq!(right, Access::Allowed, "{version}");
            let wrong = auth.check(&basic("alice:wrong"), &users, client(1)).await;
            assert_eq!(wrong, Access::Unauthorized, "{version}");
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
            assert!(cost_of(&bad).is_err(), "{bad:?}");
        }
    }
}
