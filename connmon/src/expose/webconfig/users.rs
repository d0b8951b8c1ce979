//! `basic_auth_users`: bcrypt, one at a time, verdicts remembered.

use std::collections::{BTreeMap, VecDeque};
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

/// Requests that may wait for their turn at bcrypt; more are told to come
/// back.
const WAITING: usize = 32;

/// Whether credentials are good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Let in.
    Allowed,
    /// Wrong, missing or unreadable credentials.
    Refused,
    /// Too many guesses wait.
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
    waiting: Arc<Semaphore>,
    /// bcrypt, counted by tests.
    verify: Arc<Verify>,
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

fn lock(remembered: &Mutex<Remembered>) -> MutexGuard<'_, Remembered> {
    remembered.lock().unwrap_or_else(PoisonError::into_inner)
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
            waiting: Arc::new(Semaphore::new(WAITING)),
            verify,
        })
    }

    /// Whether `headers` carry the credentials of one of `users`.
    pub(super) async fn check(
        &self,
        headers: &HeaderMap,
        users: &BTreeMap<String, String>,
    ) -> Verdict {
        let Some((name, password)) = credentials(headers) else {
            return Verdict::Refused;
        };
        // A name that does not exist costs as much as one that does: that of
        // some user, always the same for the same name.
        let (hash, exists) = match users.get(&name) {
            Some(hash) => (hash.clone(), true),
            None => (self.decoy(&name, users), false),
        };
        let tag = self.tag(&[name.as_bytes(), hash.as_bytes(), &password]);
        if let Some(verdict) = self.known(&tag) {
            return verdict;
        }
        let Ok(place) = Arc::clone(&self.waiting).try_acquire_owned() else {
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
        // On a thread of its own: a cost of 14 takes a second. Nothing stops
        // it, so it keeps its turn, and what it found out, though the client
        // may hang up meanwhile.
        let checked = tokio::task::spawn_blocking(move || {
            // Whether the name exists or not.
            let matches = verify(&password, &hash);
            let allowed = exists && matches;
            lock(&remembered).push(allowed, tag);
            drop((place, turn));
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

    fn decoy(&self, name: &str, users: &BTreeMap<String, String>) -> String {
        let tag = self.tag(&[name.as_bytes()]);
        let mut number = [0; 8];
        number.copy_from_slice(&tag.as_ref()[..8]);
        let place = u64::from_le_bytes(number) % users.len().max(1) as u64;
        let hash = users.values().nth(place as usize);
        hash.cloned().unwrap_or_default()
    }
}

/// The crate's bcrypt, with Go's view of versions: whatever stands there up to
/// 2, the algorithm is the one of `$2b$`.
fn verify(password: &[u8], hash: &str) -> bool {
    let bytes = hash.as_bytes();
    let version = if bytes.get(2) == Some(&b'$') { 3 } else { 4 };
    let rest = hash.get(version..).unwrap_or_default();
    bcrypt::verify(password, &format!("$2b${rest}")).unwrap_or(false)
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
                // The decoy is alice's hash, and must not let bob in.
                ("bob:right", Verdict::Refused),
                ("alice", Verdict::Refused),
                (":right", Verdict::Refused),
            ] {
                let verdict = door.check(&basic(credentials), &users).await;
                assert_eq!(verdict, expected, "{credentials} {round}");
            }
        }
        for other in ["Bearer x", "Basic", "Basic !!!", "Basic /w==", ""] {
            let verdict = door.check(&authorization(other), &users).await;
            assert_eq!(verdict, Verdict::Refused, "{other}");
        }
        let lower = authorization(&format!("basic {}", STANDARD.encode("alice:right")));
        assert_eq!(door.check(&lower, &users).await, Verdict::Allowed);
        assert_eq!(
            door.check(&HeaderMap::new(), &users).await,
            Verdict::Refused
        );
        // A changed hash makes every old verdict void.
        let changed = [("alice".to_owned(), bcrypt::hash("new", 4).unwrap())].into();
        assert_eq!(
            door.check(&basic("alice:right"), &changed).await,
            Verdict::Refused
        );
    }

    #[tokio::test]
    async fn guesses_are_forgotten_but_push_nobody_out() {
        let door = Doorkeeper::new().unwrap();
        let users = users();
        assert_eq!(
            door.check(&basic("alice:right"), &users).await,
            Verdict::Allowed
        );
        for number in 0..REMEMBERED + 20 {
            door.check(&basic(&format!("alice:{number}")), &users).await;
        }
        let remembered = lock(&door.remembered);
        assert_eq!(remembered.allowed.len(), 1);
        assert_eq!(remembered.refused.len(), REMEMBERED);
    }

    #[tokio::test]
    async fn many_at_once_wait_their_turn_or_are_sent_away() {
        let door = Arc::new(Doorkeeper::new().unwrap());
        let users = Arc::new(users());
        let mut guesses = tokio::task::JoinSet::new();
        for number in 0..200 {
            let (door, users) = (Arc::clone(&door), Arc::clone(&users));
            guesses.spawn(async move { door.check(&basic(&format!("x{number}:y")), &users).await });
        }
        let verdicts = guesses.join_all().await;
        let busy = verdicts
            .iter()
            .filter(|verdict| **verdict == Verdict::Busy)
            .count();
        assert!(busy >= 200 - 2 * WAITING, "{busy}");
        assert!(!verdicts.contains(&Verdict::Allowed));
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
    async fn unknown_users_cost_the_same() {
        let (door, counts) = counted();
        let users = users();
        for name in ["alice", "nobody"] {
            let before = counts[0].load(Ordering::SeqCst);
            for round in 0..5 {
                for _ in 0..2 {
                    door.check(&basic(&format!("{name}:{round}")), &users).await;
                }
            }
            assert_eq!(counts[0].load(Ordering::SeqCst) - before, 5, "{name}");
        }
    }

    #[tokio::test]
    async fn one_bcrypt_at_a_time() {
        let (door, counts) = counted();
        let (door, users) = (Arc::new(door), Arc::new(users()));
        let mut guesses = tokio::task::JoinSet::new();
        for number in 0..WAITING / 2 {
            let (door, users) = (Arc::clone(&door), Arc::clone(&users));
            guesses.spawn(async move { door.check(&basic(&format!("x{number}:y")), &users).await });
        }
        guesses.join_all().await;
        let counts = counts.each_ref().map(|count| count.load(Ordering::SeqCst));
        assert_eq!(counts, [WAITING / 2, 0, 1]);
    }

    /// Whoever hangs up while bcrypt runs gives no turn to the next, and the
    /// verdict is there when it is asked for again.
    #[tokio::test]
    async fn hanging_up_frees_no_turn_and_loses_no_verdict() {
        let (begun, begins) = std::sync::mpsc::channel();
        let (go, gone) = std::sync::mpsc::channel::<()>();
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
            tokio::time::timeout(wait, door.check(&right, &users))
                .await
                .is_err()
        );
        begins.recv().unwrap();
        let next = basic("alice:wrong");
        assert!(
            tokio::time::timeout(wait, door.check(&next, &users))
                .await
                .is_err()
        );
        assert!(begins.try_recv().is_err(), "two at once");
        go.send(()).unwrap();
        assert_eq!(door.check(&right, &users).await, Verdict::Allowed);
        assert!(begins.try_recv().is_err(), "checked twice");
    }

    /// Hashes that are accepted open the door, whatever version they name.
    #[tokio::test]
    async fn every_version_up_to_2_verifies() {
        let hash = bcrypt::hash("right", 4).unwrap();
        let rest = hash.strip_prefix("$2b$").unwrap();
        let door = Doorkeeper::new().unwrap();
        for version in ["2", "2a", "2b", "2y", "2x", "2z", "1"] {
            let users = [("alice".to_owned(), format!("${version}${rest}"))].into();
            let right = door.check(&basic("alice:right"), &users).await;
            assert_eq!(right, Verdict::Allowed, "{version}");
            let wrong = door.check(&basic("alice:wrong"), &users).await;
            assert_eq!(wrong, Verdict::Refused, "{version}");
        }
    }
}
