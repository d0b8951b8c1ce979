//! The fold against a kernel made up by the test: random connection histories
//! in several namespaces, whose events reach the fold through a ring that may
//! lose and reorder them, and whose tables are read by walks that race with
//! everything else.
//!
//! The made-up kernel knows the truth. At every step the laws must hold; with
//! nothing lost the fold must equal the truth whenever the ring is empty; after
//! a loss it must equal the truth again when two audits that began later are
//! over. Failures shrink to a minimal history.

use std::cell::Cell;
use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;

use connmon_common::state::*;
use connmon_core::event::{Event, Owner, SYN_BYTES, Socket, Traffic, Tuple};
use connmon_core::fold::{
    CrossFamilies, Direction, Flow, Fold, FoldConfig, RemoteFilter, Snapshot,
};
use connmon_core::geo::{Country, Locate};
use connmon_core::scan::{Access, Row, Trigger, Walk, WalkMessage, WalkSummary};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestError, TestRunner};

/// Namespaces of the made-up kernel.
const NETNS: [u32; 2] = [4_026_531_840, 4_026_532_000];
/// The one port that listens, in both.
const SERVICE: u16 = 80;
/// `struct sock` addresses; few, so that they are reused all the time.
const SOCKETS: usize = 6;

struct Atlas;

impl Locate for Atlas {
    fn country(&mut self, address: IpAddr) -> Country {
        match address {
            IpAddr::V4(v4) => match v4.octets()[0] {
                198 => Country::from_code("US"),
                203 => Country::from_code("DE"),
                _ => Country::PRIVATE,
            },
            IpAddr::V6(_) => Country::from_code("FR"),
        }
    }
}

/// One `struct sock` in use.
#[derive(Clone, Debug)]
struct Sock {
    netns: u32,
    tuple: Tuple,
    direction: Direction,
    state: u8,
    cookie: u64,
    /// In the tables that dumps read.
    hashed: bool,
    /// Skipped by the last dump of its namespace.
    skipped: bool,
    /// Its connect came after attach.
    connect_seen: bool,
    /// Its open came after attach, so its bytes count from zero.
    born: bool,
    /// As /proc shows it, of no other socket.
    inode: u32,
    bytes: (u64, u64),
}

impl Sock {
    fn is_open(&self) -> bool {
        !matches!(self.state, SYN_SENT | SYN_RECV)
    }

    fn is_hidden(&self) -> bool {
        self.tuple.remote.is_loopback()
    }

    fn traffic(&self) -> Traffic {
        Traffic {
            received_bytes: self.bytes.0,
            sent_bytes: self.bytes.1
                + match self.direction {
                    Direction::Outbound => SYN_BYTES,
                    _ => 0,
                },
            retransmitted_segments: 0,
            srtt_us: 100,
        }
    }
}

/// What has been read of a walk and not been folded yet.
#[derive(Debug, Default)]
struct WalkState {
    under_way: bool,
    startup: bool,
    audit: bool,
    /// Namespaces still to be read.
    todo: VecDeque<usize>,
    /// Sockets of the namespace being read that each pass has not come to.
    dump: Option<(usize, [VecDeque<usize>; 2])>,
    /// What each pass has read.
    batches: [Vec<Row>; 2],
    /// Losses when it began.
    losses: u64,
}

/// What the truth is compared on.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    established: u64,
    open: u64,
    by_country: Vec<(Country, [u64; 3])>,
}

struct World {
    fold: Fold,
    now: u64,
    socks: [Option<Sock>; SOCKETS],
    next_cookie: u64,
    attached: bool,
    /// Rows carry cookies (sock_diag) or not (/proc).
    cookies: bool,
    /// Sockets of a namespace may have the same endpoints, as bound devices
    /// and VRFs allow.
    equal: bool,
    next_inode: u32,
    ring: VecDeque<Event>,
    /// How many of the next events find the ring full.
    losing: u64,
    losses: u64,
    /// Losses that the fold was given.
    reported: u64,
    walk: WalkState,
    merged: bool,
    /// Audits since the last loss.
    audits: u64,
    opened: u64,
    failed: u64,
    /// Bytes of born connections that closed, and of everything since attach.
    born_closed_bytes: (u64, u64),
    moved_bytes: (u64, u64),
    before: Option<Snapshot>,
    steps: u64,
}

fn config(connections_max: usize) -> FoldConfig {
    FoldConfig {
        filter: RemoteFilter {
            exclude_loopback: true,
            exclude: Vec::new(),
        },
        ports_allow: None,
        ports_max: 3,
        cross: CrossFamilies::All,
        connections_max,
        listeners: true,
        listeners_max: 8,
        host_netns: NETNS[0],
        hash_key: *b"a secret of mine",
        traffic: true,
        accepts: true,
        polling: false,
    }
}

/// The endpoints of a made-up connection; few, so that they are reused too.
fn tuple(direction: Direction, pick: u8) -> Tuple {
    let remotes = [
        "198.51.100.1",
        "203.0.113.1",
        "2001:db8::1",
        "10.0.0.9",
        "127.0.0.1",
    ];
    let remote: IpAddr = remotes[usize::from(pick) % 5].parse().unwrap();
    let local: IpAddr = match remote {
        IpAddr::V4(v4) if v4.is_loopback() => remote,
        IpAddr::V4(_) => [10, 0, 0, 1].into(),
        IpAddr::V6(_) => "2001:db8::2".parse().unwrap(),
    };
    let variant = u16::from(pick / 5 % 2);
    let (local_port, remote_port) = match direction {
        Direction::Inbound => (SERVICE, 50_000 + variant),
        _ => (40_000, 443 + variant),
    };
    Tuple {
        local,
        local_port,
        remote,
        remote_port,
    }
}

impl World {
    fn new(cookies: bool, equal: bool) -> Self {
        Self {
            fold: Fold::new(config(1000)),
            now: 1_000_000,
            socks: [const { None }; SOCKETS],
            next_cookie: 1,
            attached: false,
            cookies,
            equal,
            next_inode: 1,
            ring: VecDeque::new(),
            losing: 0,
            losses: 0,
            reported: 0,
            walk: WalkState::default(),
            merged: false,
            audits: 0,
            opened: 0,
            failed: 0,
            born_closed_bytes: (0, 0),
            moved_bytes: (0, 0),
            before: None,
            steps: 0,
        }
    }

    /// One step of a history: `what` chooses, `which` and `how` qualify.
    fn step(&mut self, what: u8, which: u8, how: u8, lossy: bool) {
        self.now += 1_000;
        self.steps += 1;
        let slot = usize::from(which) % SOCKETS;
        // Before the first rows nothing shows which of several sockets with
        // the same endpoints an event is of; a first audit puts that right.
        let starts = self.attached && !self.merged;
        match what {
            0..=95 if self.equal && starts => {}
            66..=77 if self.equal && !self.merged => {}
            0..=11 => self.connect(slot, how),
            12..=23 => self.child(slot, how),
            24..=41 => self.complete(slot, how),
            42..=45 => self.fail(slot),
            46..=57 => self.change(slot, how),
            58..=65 => self.quiet_change(slot),
            66..=77 => self.unhash(slot),
            78..=95 => self.close(slot),
            96..=101 => self.exchange(slot, how),
            102..=107 => self.reorder(usize::from(which)),
            108..=123 => self.drain(1 + usize::from(how) % 4),
            124..=127 => self.drain(usize::MAX),
            128..=139 => self.begin_walk(how),
            // A dump is quick: several sockets between two other things.
            140..=223 => {
                for _ in 0..=how % 4 {
                    self.walk_step(which, how);
                }
            }
            224..=229 => {
                self.fold.sweep(self.now);
            }
            230 if lossy && self.attached => self.losing += 1 + u64::from(how) % 3,
            231..=239 => self.attached = true,
            240..=255 => self.sync(),
            _ => {}
        }
        self.check_laws();
    }

    /// 7 → 2
    fn connect(&mut self, slot: usize, how: u8) {
        let tuple = tuple(Direction::Outbound, self.pick(how));
        let netns = NETNS[usize::from(how) % 2];
        if self.socks[slot].is_some() || self.is_taken(netns, &tuple) {
            return;
        }
        let sock = self.born(netns, tuple, Direction::Outbound, SYN_SENT);
        self.socks[slot] = Some(sock);
        let (socket, at_ns) = (self.socket(slot), self.now);
        // Autobound: the local port comes later.
        let tuple = Tuple {
            local_port: 0,
            ..tuple
        };
        self.emit(Event::Connect {
            socket,
            at_ns,
            tuple,
            owner: Owner::default(),
        });
    }

    /// 10 → 3, which is not sent
    fn child(&mut self, slot: usize, how: u8) {
        let tuple = tuple(Direction::Inbound, self.pick(how));
        let netns = NETNS[usize::from(how) % 2];
        if self.socks[slot].is_some() || self.is_taken(netns, &tuple) {
            return;
        }
        let sock = self.born(netns, tuple, Direction::Inbound, SYN_RECV);
        self.socks[slot] = Some(sock);
    }

    /// Which endpoints; fewer where they are to meet.
    fn pick(&self, how: u8) -> u8 {
        if self.equal { how >> 1 & 1 } else { how >> 1 }
    }

    fn born(&mut self, netns: u32, tuple: Tuple, direction: Direction, state: u8) -> Sock {
        let inode = self.next_inode;
        self.next_inode += 1;
        Sock {
            netns,
            tuple,
            direction,
            state,
            cookie: 0,
            hashed: true,
            skipped: false,
            connect_seen: self.attached && state == SYN_SENT,
            born: false,
            inode,
            bytes: (0, 0),
        }
    }

    /// Endpoints are unique among hashed sockets of a namespace, devices aside.
    fn is_taken(&self, netns: u32, tuple: &Tuple) -> bool {
        !self.equal
            && self
                .socks
                .iter()
                .flatten()
                .any(|sock| sock.hashed && sock.netns == netns && sock.tuple == *tuple)
    }

    /// 2|3 → open, or 2 → 3 (simultaneous open, not sent)
    fn complete(&mut self, slot: usize, how: u8) {
        let attached = self.attached;
        let Some(sock) = self.socks[slot].as_mut().filter(|sock| !sock.is_open()) else {
            return;
        };
        let old = sock.state;
        if old == SYN_SENT && how.is_multiple_of(8) {
            sock.state = SYN_RECV;
            return;
        }
        let new = match (old, how % 8) {
            (SYN_RECV, 1) => FIN_WAIT1,
            (SYN_RECV, 2) => CLOSE_WAIT,
            _ => ESTABLISHED,
        };
        sock.state = new;
        sock.born = attached;
        if old == SYN_RECV && attached && !sock.connect_seen {
            // As above: all that is known of it is inbound.
            sock.direction = Direction::Inbound;
        }
        let (tuple, hidden) = (sock.tuple, sock.is_hidden());
        self.opened += u64::from(attached && !hidden);
        let (socket, at_ns) = (self.socket(slot), self.now);
        if how % 16 == 3 && old == SYN_RECV {
            self.emit(Event::Accept {
                id: socket.id,
                at_ns,
                owner: Owner::default(),
            });
        }
        self.emit(Event::Open {
            socket,
            at_ns,
            tuple,
            old,
            new,
        });
        if how % 16 == 4 && old == SYN_RECV {
            self.emit(Event::Accept {
                id: socket.id,
                at_ns,
                owner: Owner::default(),
            });
        }
    }

    /// 2|3 → 7
    fn fail(&mut self, slot: usize) {
        let Some(sock) = self.socks[slot].take_if(|sock| !sock.is_open()) else {
            return;
        };
        // One whose connect came before attach and that is in SYN_RECV cannot
        // be distinguished from a passive child.
        let known = sock.state == SYN_SENT || sock.connect_seen;
        self.failed += u64::from(self.attached && !sock.is_hidden() && known);
        self.emit_close(slot, &sock, 111);
    }

    /// 1 → 4|8
    fn change(&mut self, slot: usize, how: u8) {
        let Some(sock) = self.socks[slot]
            .as_mut()
            .filter(|sock| sock.state == ESTABLISHED && sock.hashed)
        else {
            return;
        };
        let new = if how.is_multiple_of(2) {
            FIN_WAIT1
        } else {
            CLOSE_WAIT
        };
        sock.state = new;
        let tuple = sock.tuple;
        let socket = self.socket(slot);
        self.emit(Event::Change {
            socket,
            tuple,
            old: ESTABLISHED,
            new,
        });
    }

    /// 4 → 5, 8 → 9, 5 → 11: not sent
    fn quiet_change(&mut self, slot: usize) {
        if let Some(sock) = self.socks[slot].as_mut().filter(|sock| sock.hashed) {
            sock.state = match sock.state {
                FIN_WAIT1 => FIN_WAIT2,
                CLOSE_WAIT => LAST_ACK,
                FIN_WAIT2 => CLOSING,
                state => state,
            };
        }
    }

    /// `tcp_set_state` unhashes before it reports.
    fn unhash(&mut self, slot: usize) {
        if let Some(sock) = self.socks[slot].as_mut().filter(|sock| sock.is_open()) {
            sock.hashed = false;
        }
    }

    /// open → 7
    fn close(&mut self, slot: usize) {
        let Some(sock) = self.socks[slot].take_if(|sock| sock.is_open()) else {
            return;
        };
        if sock.born && !sock.is_hidden() {
            self.born_closed_bytes.0 += sock.bytes.0;
            self.born_closed_bytes.1 += sock.bytes.1;
        }
        self.emit_close(slot, &sock, 0);
    }

    fn emit_close(&mut self, slot: usize, sock: &Sock, error: u32) {
        let socket = Socket {
            id: address(slot),
            cookie: sock.cookie,
            netns: sock.netns,
        };
        self.emit(Event::Close {
            socket,
            at_ns: self.now,
            tuple: sock.tuple,
            old: sock.state,
            error,
            segments_out: Some(1),
            shut_down: false,
            traffic: Some(sock.traffic()),
        });
    }

    fn exchange(&mut self, slot: usize, how: u8) {
        let attached = self.attached;
        if let Some(sock) = self.socks[slot]
            .as_mut()
            .filter(|sock| sock.state == ESTABLISHED)
        {
            let (received, sent) = (u64::from(how) * 100, u64::from(how) + 1);
            sock.bytes.0 += received;
            sock.bytes.1 += sent;
            if attached && !sock.is_hidden() {
                self.moved_bytes.0 += received;
                self.moved_bytes.1 += sent;
            }
        }
    }

    fn socket(&self, slot: usize) -> Socket {
        let sock = self.socks[slot].as_ref().unwrap();
        Socket {
            id: address(slot),
            cookie: sock.cookie,
            netns: sock.netns,
        }
    }

    fn emit(&mut self, event: Event) {
        if !self.attached {
            return;
        }
        if self.losing > 0 {
            self.losing -= 1;
            self.losses += 1;
            self.audits = 0;
            if TRACE.get() {
                println!("{} LOST {event:?}", self.now);
            }
            return;
        }
        self.ring.push_back(event);
    }

    /// Events of different sockets may change places on their way.
    fn reorder(&mut self, at: usize) {
        if self.ring.len() < 2 {
            return;
        }
        let at = at % (self.ring.len() - 1);
        if id(&self.ring[at]) != id(&self.ring[at + 1]) {
            self.ring.swap(at, at + 1);
        }
    }

    fn drain(&mut self, most: usize) {
        for _ in 0..most {
            let Some(event) = self.ring.pop_front() else {
                break;
            };
            if TRACE.get() {
                println!("{} {event:?}", self.now);
            }
            self.fold.apply(self.now, &event, &mut Atlas);
        }
        if self.losses > self.reported {
            self.fold.lost(self.losses - self.reported);
            self.reported = self.losses;
        }
    }

    fn begin_walk(&mut self, how: u8) {
        if !self.attached || self.walk.under_way {
            return;
        }
        self.drain(usize::MAX);
        let startup = !self.merged;
        let audit = startup || !how.is_multiple_of(4);
        self.walk = WalkState {
            under_way: true,
            startup,
            audit,
            todo: (0..NETNS.len()).collect(),
            losses: self.losses,
            ..WalkState::default()
        };
        self.fold_message(WalkMessage::Begin(Walk {
            trigger: if startup {
                Trigger::Startup
            } else {
                Trigger::Interval
            },
            traffic: true,
            audit,
        }));
    }

    /// Reads one socket, or folds what was read, or goes on to the next table.
    fn walk_step(&mut self, which: u8, how: u8) {
        if !self.walk.under_way {
            return;
        }
        let Some((namespace, mut left)) = self.walk.dump.take() else {
            match self.walk.todo.pop_front() {
                Some(namespace) => self.begin_namespace(namespace, which),
                None => self.end_walk(),
            }
            return;
        };
        // Both passes of a startup walk go on at the same time.
        let pass = match left.each_ref().map(VecDeque::is_empty) {
            [false, false] => which % 2,
            [first_is_through, _] => u8::from(first_is_through),
        };
        match left[usize::from(pass)].pop_front() {
            None => {
                self.deliver(0);
                self.deliver(1);
                self.fold_message(WalkMessage::NamespaceEnd {
                    netns: NETNS[namespace],
                    access: if self.cookies {
                        Access::Diag
                    } else {
                        Access::Proc
                    },
                    complete: true,
                });
                return;
            }
            Some(slot) => {
                self.read(slot, namespace, pass, how);
                // The same row, repeated on a resume boundary.
                if how % 32 == 31 {
                    left[usize::from(pass)].push_back(slot);
                }
            }
        }
        self.walk.dump = Some((namespace, left));
        if how.is_multiple_of(4) {
            self.deliver(pass);
        }
    }

    fn begin_namespace(&mut self, namespace: usize, which: u8) {
        self.drain(usize::MAX);
        self.fold_message(WalkMessage::NamespaceBegin {
            netns: NETNS[namespace],
            surrogate: false,
            t0_ns: self.now,
            ephemeral: (32_768, 60_999),
        });
        let mut listen = Row {
            state: LISTEN,
            tuple: tuple(Direction::Inbound, 0),
            cookie: 0,
            inode: 1,
            id: 0,
            receive_queue: 0,
            send_queue: 128,
            traffic: None,
            owner: Owner::default(),
        };
        listen.tuple.local = std::net::Ipv6Addr::UNSPECIFIED.into();
        let mut order: VecDeque<usize> = (0..SOCKETS).collect();
        order.rotate_left(usize::from(which) % SOCKETS);
        let mut left = [order.clone(), VecDeque::new()];
        self.walk.batches[0].push(listen);
        if self.walk.startup {
            order.rotate_left(1);
            left[1] = order;
            self.walk.batches[1].push(listen);
        }
        self.walk.dump = Some((namespace, left));
    }

    fn read(&mut self, slot: usize, namespace: usize, pass: u8, how: u8) {
        let Some(sock) = self.socks[slot]
            .as_mut()
            .filter(|sock| sock.hashed && sock.netns == NETNS[namespace])
        else {
            return;
        };
        // A dump may skip a socket, but not repeatedly; one of several
        // that only /proc distinguishes, and only for a walk, not at all.
        let last_pass = self.walk.startup && pass == 1;
        let may_skip = !sock.skipped && !last_pass && (self.cookies || !self.equal);
        sock.skipped = may_skip && how % 16 == 15;
        if sock.skipped {
            return;
        }
        if self.cookies && sock.cookie == 0 {
            sock.cookie = self.next_cookie;
            self.next_cookie += 1;
        }
        self.walk.batches[usize::from(pass)].push(Row {
            state: sock.state,
            tuple: sock.tuple,
            cookie: sock.cookie,
            inode: sock.inode,
            id: 0,
            receive_queue: 0,
            send_queue: 0,
            traffic: (self.cookies && (pass == 1 || !self.walk.startup)).then(|| sock.traffic()),
            owner: Owner::default(),
        });
    }

    fn deliver(&mut self, pass: u8) {
        self.drain(usize::MAX);
        let rows = std::mem::take(&mut self.walk.batches[usize::from(pass)]);
        self.fold_message(WalkMessage::Rows { pass, rows });
    }

    fn end_walk(&mut self) {
        // What is unhashed is reported within two audits.
        self.finish_unhashed();
        self.drain(usize::MAX);
        self.fold_message(WalkMessage::End(WalkSummary::default()));
        while self.fold.sweep(self.now) {}
        // Every loss was reported. (Without cookies, or with several of the same
        // endpoints, a row may keep an entry whose close was lost long ago.)
        let unexplained = self.fold.take_unexplained();
        if self.cookies && !self.equal || self.losses == 0 && (self.cookies || !self.equal) {
            assert_eq!(unexplained, None);
        }
        let walk = std::mem::take(&mut self.walk);
        self.merged = true;
        if walk.audit && walk.losses == self.losses {
            self.audits += 1;
        } else if walk.audit {
            self.audits = 0;
        }
    }

    fn fold_message(&mut self, message: WalkMessage) {
        if TRACE.get() {
            println!("{} {message:?}", self.now);
        }
        self.fold.walk(self.now, message, &mut Atlas);
    }

    fn finish_unhashed(&mut self) {
        for slot in 0..SOCKETS {
            if self.socks[slot].as_ref().is_some_and(|sock| !sock.hashed) {
                self.close(slot);
            }
        }
    }

    /// Empties the ring and compares with the truth where it must be equal.
    fn sync(&mut self) {
        self.finish_unhashed();
        self.drain(usize::MAX);
        if !self.merged || self.walk.under_way && self.walk.startup {
            return;
        }
        let snapshot = self.fold.snapshot();
        let truth = self.truth();
        let folded = counts(&snapshot);
        // Without cookies a walk may take a change of one for that of another
        // with the same endpoints, until the next one.
        let guesses = self.equal && !self.cookies;
        if self.losses == 0 && !guesses {
            assert_eq!(folded, truth, "nothing was lost");
            compared(When::Lossless);
            self.compare_totals(&snapshot);
        } else if self.cookies && !self.equal && self.audits >= 2 && !self.walk.under_way {
            compared(When::Audited);
            self.compare_after_loss(&snapshot);
        }
    }

    /// Which way a connection went may be lost for good, all else comes back.
    fn compare_after_loss(&self, snapshot: &Snapshot) {
        let (folded, truth) = (counts(snapshot), self.truth());
        assert_eq!(
            (folded.established, folded.open, totals(&folded)),
            (truth.established, truth.open, totals(&truth)),
            "two audits after a loss"
        );
    }

    fn compare_totals(&self, snapshot: &Snapshot) {
        let flow = flow_of(snapshot);
        assert_eq!(flow.opened, self.opened, "opened");
        let corrections = snapshot.corrections;
        assert_eq!(
            (corrections.added, corrections.removed, corrections.updated),
            (0, 0, 0),
            "nothing to correct"
        );
        assert!(snapshot.drift.is_none_or(|drift| drift == 0));
        let failed: u64 = snapshot.countries.iter().flat_map(|row| row.failures).sum();
        assert_eq!(failed, self.failed, "failed");
        for (counted, least, most) in [
            (
                flow.received_bytes,
                self.born_closed_bytes.0,
                self.moved_bytes.0,
            ),
            (
                flow.sent_bytes,
                self.born_closed_bytes.1,
                self.moved_bytes.1,
            ),
        ] {
            assert!(
                counted >= least && counted <= most,
                "{least} <= {counted} <= {most}"
            );
        }
    }

    fn truth(&self) -> Counts {
        let mut counts = Counts::default();
        let mut countries = vec![[0; 3]; Country::COUNT];
        for sock in self.socks.iter().flatten() {
            if sock.is_hidden() || !sock.is_open() {
                continue;
            }
            counts.open += 1;
            if sock.state == ESTABLISHED {
                counts.established += 1;
                let country = Atlas.country(sock.tuple.remote);
                countries[country.index()][sock.direction as usize] += 1;
            }
        }
        counts.by_country = listed(countries);
        counts
    }

    /// What holds at every moment, whatever was lost.
    fn check_laws(&mut self) {
        let snapshot = self.fold.snapshot();
        check_laws(&snapshot, self.before.as_ref());
        self.before = Some(snapshot);
    }
}

fn address(slot: usize) -> u64 {
    0xffff_8880_0000_0000 + slot as u64 * 2048
}

fn id(event: &Event) -> u64 {
    match *event {
        Event::Connect { socket, .. }
        | Event::Open { socket, .. }
        | Event::Restore { socket, .. }
        | Event::Change { socket, .. }
        | Event::Close { socket, .. }
        | Event::Listen { socket, .. }
        | Event::Unlisten { socket, .. } => socket.id,
        Event::ConnectSent { id, .. } | Event::Accept { id, .. } => id,
    }
}

fn listed(countries: Vec<[u64; 3]>) -> Vec<(Country, [u64; 3])> {
    countries
        .into_iter()
        .enumerate()
        .filter(|(_, flows)| *flows != [0; 3])
        .map(|(index, flows)| (Country::from_index(index).unwrap(), flows))
        .collect()
}

fn counts(snapshot: &Snapshot) -> Counts {
    let mut countries = vec![[0; 3]; Country::COUNT];
    for row in &snapshot.countries {
        countries[row.country.index()] = row.flows.map(|flow| flow.connections);
    }
    Counts {
        established: snapshot.established,
        open: snapshot.tracked,
        by_country: listed(countries),
    }
}

fn totals(counts: &Counts) -> Vec<(Country, u64)> {
    counts
        .by_country
        .iter()
        .map(|(country, flows)| (*country, flows.iter().sum()))
        .collect()
}

fn flow_of(snapshot: &Snapshot) -> Flow {
    let mut sum = Flow::default();
    for flow in snapshot.countries.iter().flat_map(|row| &row.flows) {
        add(&mut sum, flow);
    }
    sum
}

fn add(sum: &mut Flow, flow: &Flow) {
    sum.connections += flow.connections;
    sum.opened += flow.opened;
    sum.closed += flow.closed;
    sum.received_bytes += flow.received_bytes;
    sum.sent_bytes += flow.sent_bytes;
    sum.retransmitted_segments += flow.retransmitted_segments;
}

fn check_laws(snapshot: &Snapshot, before: Option<&Snapshot>) {
    let flow = flow_of(snapshot);
    let mut ports = Flow::default();
    for row in &snapshot.ports {
        add(&mut ports, &row.flow);
    }
    if snapshot
        .series_evicted
        .iter()
        .all(|&(_, evicted)| evicted == 0)
    {
        assert_eq!(flow, ports, "countries and ports agree");
    } else {
        // The past of a port row ends with it.
        assert_eq!(
            flow.connections, ports.connections,
            "countries and ports agree"
        );
        assert!(flow.opened >= ports.opened && flow.closed >= ports.closed);
    }
    assert_eq!(flow.connections, snapshot.established);
    let cross: u64 = snapshot.cross.iter().map(|row| row.connections).sum();
    assert!(cross <= snapshot.established);
    assert!(snapshot.established <= snapshot.tracked);
    if snapshot.table_overflow == 0 {
        let corrections = snapshot.corrections;
        assert_eq!(
            flow.opened + corrections.seeded + corrections.added,
            flow.closed + corrections.removed + snapshot.tracked,
            "the law of connections"
        );
    }
    // No row ended in so short a history, so no counter may go down.
    let Some(before) = before else { return };
    let earlier = flow_of(before);
    assert!(
        flow.opened >= earlier.opened
            && flow.closed >= earlier.closed
            && flow.received_bytes >= earlier.received_bytes
            && flow.sent_bytes >= earlier.sent_bytes,
        "counters only rise"
    );
}

/// Where the fold was compared with the truth.
#[derive(Clone, Copy, Debug)]
enum When {
    /// With nothing lost.
    Lossless,
    /// Two audits after a loss, in the middle of things.
    Audited,
    /// At the quiet end of a history with losses.
    Quiet,
}

thread_local! {
    /// Whether everything folded is printed.
    static TRACE: Cell<bool> = const { Cell::new(false) };
    /// How often the fold equalled the truth in this test, by [`When`].
    static COMPARED: Cell<[u64; 3]> = const { Cell::new([0; 3]) };
}

fn compared(when: When) {
    let mut counts = COMPARED.get();
    counts[when as usize] += 1;
    COMPARED.set(counts);
}

type Step = (u8, u8, u8);

fn history(length: usize) -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec((any::<u8>(), any::<u8>(), any::<u8>()), 0..length)
}

/// Steps of each test: `CONNMON_MODEL_STEPS`, else a million with
/// optimisation, half of that under `CI=true`, else what a plain test run has
/// patience for.
#[expect(clippy::disallowed_methods, reason = "the test is not the core")]
fn steps_wanted() -> u64 {
    let wanted = std::env::var("CONNMON_MODEL_STEPS").ok();
    let ci = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    match wanted.and_then(|steps| steps.parse().ok()) {
        Some(steps) => steps,
        None if !cfg!(debug_assertions) => 1_000_000,
        None if ci => 500_000,
        None => 100_000,
    }
}

/// The seed of the histories: `PROPTEST_RNG_SEED`, else a new one.
fn seed() -> u64 {
    match Config::default().rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => RandomState::new().hash_one(()),
    }
}

/// Plays random histories; comparisons of each kind in `expected` must have
/// been made by their end.
fn run(name: &str, expected: &[When], test: impl Fn(Vec<Step>) -> u64) {
    const LENGTH: usize = 1200;
    let cases = steps_wanted() / (LENGTH as u64 / 2);
    let seed = seed();
    let mut runner = TestRunner::new(Config {
        cases: cases.max(1) as u32,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        max_shrink_iters: 200_000,
        ..Config::default()
    });
    COMPARED.set([0; 3]);
    let steps = Cell::new(0);
    let result = runner.run(&history(LENGTH), |history| {
        steps.set(steps.get() + test(history));
        Ok(())
    });
    match result {
        Err(TestError::Fail(why, history)) => {
            // Once more, aloud.
            TRACE.set(true);
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(history)));
            panic!(
                "{name}: {why}; what was folded is listed above; \
                 repeat with PROPTEST_RNG_SEED={seed}"
            );
        }
        Err(error) => panic!("{name}: {error}; repeat with PROPTEST_RNG_SEED={seed}"),
        Ok(()) => {}
    }
    let (steps, counts) = (steps.get(), COMPARED.get());
    let [lossless, audited, quiet] = counts;
    println!(
        "{name}: {steps} steps in {cases} histories; equal to the truth \
         {lossless} times with nothing lost, {audited} times two audits after \
         a loss, {quiet} times once things were quiet"
    );
    for &when in expected {
        assert!(
            counts[when as usize] > 0,
            "{name}: never compared: {when:?}"
        );
    }
}

fn play(history: &[Step], cookies: bool, lossy: bool) -> u64 {
    play_in(World::new(cookies, false), history, lossy)
}

/// As [`play`], where many sockets have the same endpoints.
fn play_equal(history: &[Step], cookies: bool, lossy: bool) -> u64 {
    play_in(World::new(cookies, true), history, lossy)
}

fn play_in(mut world: World, history: &[Step], lossy: bool) -> u64 {
    for &(what, which, how) in history {
        world.step(what, which, how, lossy);
    }
    heal(&mut world);
    world.steps
}

/// Whatever happened, two more audits make it right.
fn heal(world: &mut World) {
    world.attached = true;
    world.losing = 0;
    for _ in 0..4 {
        while world.walk.under_way {
            world.walk_step(0, 1);
        }
        world.begin_walk(1);
        while world.walk.under_way {
            world.walk_step(0, 1);
        }
    }
    world.sync();
    world.check_laws();
    let snapshot = world.fold.snapshot();
    assert_eq!(snapshot.drift, Some(0), "healed");
    world.compare_after_loss(&snapshot);
    if world.losses > 0 || world.equal {
        compared(When::Quiet);
    }
}

#[test]
fn nothing_lost_means_nothing_wrong_with_cookies() {
    run("lossless, sock_diag", &[When::Lossless], |history| {
        play(&history, true, false)
    });
}

#[test]
fn nothing_lost_means_nothing_wrong_without_cookies() {
    run("lossless, /proc", &[When::Lossless], |history| {
        play(&history, false, false)
    });
}

#[test]
fn sockets_with_the_same_endpoints_count_one_by_one_with_cookies() {
    run("lossless equal, sock_diag", &[When::Lossless], |history| {
        play_equal(&history, true, false)
    });
}

#[test]
fn sockets_with_the_same_endpoints_come_right_without_cookies() {
    run("lossless equal, /proc", &[When::Quiet], |history| {
        play_equal(&history, false, false)
    });
}

#[test]
fn losses_of_sockets_with_the_same_endpoints_heal_too() {
    run("lossy equal, sock_diag", &[When::Quiet], |history| {
        play_equal(&history, true, true)
    });
}

#[test]
fn losses_heal_within_two_audits() {
    run(
        "lossy, sock_diag",
        &[When::Audited, When::Quiet],
        |history| play(&history, true, true),
    );
}

#[test]
fn losses_heal_without_cookies_once_things_are_quiet() {
    run("lossy, /proc", &[When::Quiet], |history| {
        play(&history, false, true)
    });
}

/// Events and messages that no kernel sends in this order.
struct Chaos {
    fold: Fold,
    now: u64,
    before: Option<Snapshot>,
}

impl Chaos {
    fn step(&mut self, what: u8, which: u8, how: u8) {
        self.now += u64::from(how) << (which % 32);
        let socket = Socket {
            id: address(usize::from(which) % 4),
            cookie: u64::from(how % 3),
            netns: [0, NETNS[0], NETNS[1]][usize::from(how / 3) % 3],
        };
        let direction = if how.is_multiple_of(2) {
            Direction::Inbound
        } else {
            Direction::Outbound
        };
        let tuple = tuple(direction, which / 4);
        let (at_ns, owner) = (self.now ^ u64::from(what), Owner::default());
        let state = |seed: u8| 1 + seed % 12;
        let traffic = Traffic {
            received_bytes: u64::from(how) << (which % 64),
            sent_bytes: u64::from(which) << (how % 64),
            retransmitted_segments: u32::from(how) << (which % 32),
            srtt_us: how.into(),
        };
        let event = match what {
            0..=31 => Event::Connect {
                socket,
                at_ns,
                tuple,
                owner,
            },
            32..=95 => Event::Open {
                socket,
                at_ns,
                tuple,
                old: 2 + how % 2,
                new: [ESTABLISHED, ESTABLISHED, FIN_WAIT1, CLOSE_WAIT][usize::from(how / 4) % 4],
            },
            96..=99 => Event::Restore { socket, tuple },
            100..=111 => Event::Change {
                socket,
                tuple,
                old: state(how),
                new: state(which),
            },
            112..=159 => Event::Close {
                socket,
                at_ns,
                tuple,
                old: state(how),
                error: u32::from(which % 2) * 111,
                segments_out: Some(how.into()),
                shut_down: which.is_multiple_of(3),
                traffic: which.is_multiple_of(2).then_some(traffic),
            },
            160..=167 => Event::Accept {
                id: socket.id,
                at_ns,
                owner,
            },
            168..=171 => Event::ConnectSent {
                id: socket.id,
                at_ns,
                owner,
            },
            172..=175 => {
                let (address, port) = (tuple.local, u16::from(how % 8));
                Event::Listen {
                    socket,
                    address,
                    port,
                    owner,
                }
            }
            176..=179 => {
                let (address, port) = (tuple.local, u16::from(how % 8));
                Event::Unlisten {
                    socket,
                    address,
                    port,
                }
            }
            _ => return self.message(what, which, how, socket, tuple, traffic),
        };
        self.fold.apply(self.now, &event, &mut Atlas);
    }

    fn message(
        &mut self,
        what: u8,
        which: u8,
        how: u8,
        socket: Socket,
        tuple: Tuple,
        traffic: Traffic,
    ) {
        let message = match what {
            180..=189 => WalkMessage::Begin(Walk {
                trigger: [Trigger::Startup, Trigger::Interval, Trigger::Loss]
                    [usize::from(which) % 3],
                traffic: true,
                audit: !how.is_multiple_of(4),
            }),
            190..=199 => WalkMessage::NamespaceBegin {
                netns: socket.netns,
                surrogate: how.is_multiple_of(8),
                t0_ns: self.now,
                ephemeral: (32_768, 60_999),
            },
            200..=231 => WalkMessage::Rows {
                pass: which % 2,
                rows: vec![Row {
                    state: 1 + how % 12,
                    tuple,
                    cookie: socket.cookie,
                    inode: 0,
                    id: 0,
                    receive_queue: how.into(),
                    send_queue: 1,
                    traffic: Some(traffic),
                    owner: Owner::default(),
                }],
            },
            232..=239 => WalkMessage::NamespaceEnd {
                netns: socket.netns,
                access: [Access::Diag, Access::Proc, Access::Unaudited][usize::from(which) % 3],
                complete: !how.is_multiple_of(4),
            },
            240..=247 => WalkMessage::End(WalkSummary::default()),
            248..=250 => return self.fold.lost(how.into()),
            _ => {
                self.fold.sweep(self.now);
                return;
            }
        };
        self.fold.walk(self.now, message, &mut Atlas);
    }
}

#[test]
fn no_order_of_events_breaks_the_laws() {
    run("any order", &[], |history| {
        // The first step shapes the fold: a small table, or polling.
        let shape = history.first().map_or(0, |step| step.1);
        let mut config = config([1000, 3][usize::from(shape % 2)]);
        config.polling = shape % 8 == 7;
        let mut chaos = Chaos {
            fold: Fold::new(config),
            now: 1,
            before: None,
        };
        for &(what, which, how) in &history {
            chaos.step(what, which, how);
            let snapshot = chaos.fold.snapshot();
            // Rows may end here, and with them their counters.
            let before = chaos
                .before
                .take()
                .filter(|before| before.series_evicted == snapshot.series_evicted);
            check_laws(&snapshot, before.as_ref());
            assert!(snapshot.tracked + snapshot.untracked < 1 << 32);
            chaos.before = Some(snapshot);
        }
        history.len() as u64
    });
}
