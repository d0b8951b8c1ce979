//! Unit tests of the fold, by concern, over one small harness.

mod events;
mod polling;
mod traffic;
mod walks;

use connmon_common::state::*;

use crate::event::{Cookie, Event, Owner, SYN_BYTES, Socket, SocketId, Traffic, Tuple};
use crate::geo::{Country, Locate};
use crate::scan::{Access, Row, Trigger, Walk, WalkMessage, WalkSummary};

use super::*;

const MS: u64 = 1_000_000;
const S: u64 = 1_000 * MS;

/// 198.51.100.0/24 is in the US, 203.0.113.0/24 in Germany, 2001:db8::/32 in
/// France, the rest is private; counts lookups.
#[derive(Default)]
struct Atlas {
    lookups: u64,
}

impl Locate for Atlas {
    fn country(&mut self, address: IpAddr) -> Country {
        self.lookups += 1;
        match address {
            IpAddr::V4(v4) if v4.octets()[..3] == [198, 51, 100] => Country::from_code("US"),
            IpAddr::V4(v4) if v4.octets()[..3] == [203, 0, 113] => Country::from_code("DE"),
            IpAddr::V6(v6) if v6.segments()[..2] == [0x2001, 0xdb8] => Country::from_code("FR"),
            _ => Country::PRIVATE,
        }
    }
}

fn config() -> FoldConfig {
    FoldConfig {
        filter: RemoteFilter {
            exclude_loopback: true,
            exclude: Vec::new(),
        },
        ports_allow: None,
        ports_max: 128,
        cross: CrossFamilies::All,
        connections_max: 1000,
        listeners: true,
        listeners_max: 512,
        host_netns: 1,
        hash_key: [9; 16],
        traffic: true,
        accepts: true,
        polling: false,
    }
}

/// A fold, its atlas and its clock.
struct Bench {
    fold: Fold,
    atlas: Atlas,
    now: u64,
}

impl Bench {
    fn new(config: FoldConfig) -> Self {
        Self {
            fold: Fold::new(config),
            atlas: Atlas::default(),
            now: S,
        }
    }

    fn apply(&mut self, event: Event) {
        self.fold.apply(self.now, &event, &mut self.atlas);
        self.check();
    }

    fn connect(&mut self, id: SocketId, tuple: Tuple) {
        let at_ns = self.now;
        self.apply(Event::Connect {
            socket: socket(id, 0),
            at_ns,
            tuple: Tuple {
                local_port: 0,
                ..tuple
            },
            owner: Owner::default(),
        });
    }

    fn open(&mut self, id: SocketId, tuple: Tuple, old: u8, new: u8) {
        let at_ns = self.now;
        self.apply(Event::Open {
            socket: socket(id, 0),
            at_ns,
            tuple,
            old,
            new,
        });
    }

    fn change(&mut self, id: SocketId, tuple: Tuple, new: u8) {
        self.apply(Event::Change {
            socket: socket(id, 0),
            tuple,
            old: ESTABLISHED,
            new,
        });
    }

    fn close(&mut self, id: SocketId, tuple: Tuple, old: u8) {
        self.close_with(id, 0, tuple, old, 0, Some(3), None);
    }

    #[expect(clippy::too_many_arguments, reason = "the event's own fields")]
    fn close_with(
        &mut self,
        id: SocketId,
        cookie: Cookie,
        tuple: Tuple,
        old: u8,
        error: u32,
        segments_out: Option<u32>,
        traffic: Option<Traffic>,
    ) {
        let at_ns = self.now;
        self.apply(Event::Close {
            socket: socket(id, cookie),
            at_ns,
            tuple,
            old,
            error,
            segments_out,
            shut_down: false,
            traffic,
        });
    }

    fn accept(&mut self, id: SocketId) {
        let at_ns = self.now;
        self.apply(Event::Accept {
            id,
            at_ns,
            owner: Owner::default(),
        });
    }

    fn walk(&mut self, message: WalkMessage) {
        self.fold.walk(self.now, message, &mut self.atlas);
        self.check();
    }

    fn begin(&mut self, trigger: Trigger) {
        self.now += MS;
        self.walk(WalkMessage::Begin(Walk {
            trigger,
            traffic: true,
            audit: true,
        }));
    }

    /// One namespace of a walk.
    fn namespace(&mut self, netns: NetnsId, rows: Vec<Row>) {
        self.namespace_begin(netns);
        self.rows(0, rows);
        self.namespace_end(netns, true);
    }

    fn rows(&mut self, pass: u8, rows: Vec<Row>) {
        self.walk(WalkMessage::Rows { pass, rows });
    }

    fn namespace_begin(&mut self, netns: NetnsId) {
        self.now += MS;
        self.walk(WalkMessage::NamespaceBegin {
            netns,
            surrogate: false,
            t0_ns: self.now,
            ephemeral: (32768, 60999),
        });
        self.now += MS;
    }

    fn namespace_end(&mut self, netns: NetnsId, complete: bool) {
        self.walk(WalkMessage::NamespaceEnd {
            netns,
            access: Access::Diag,
            complete,
        });
    }

    fn end(&mut self) {
        self.walk(WalkMessage::End(WalkSummary::default()));
        while self.fold.sweep(self.now) {
            self.check();
        }
        self.check();
    }

    /// A startup walk that finds `rows` in namespace 1, in both passes.
    fn startup(&mut self, rows: Vec<Row>) {
        self.begin(Trigger::Startup);
        self.namespace_begin(1);
        self.rows(0, rows.clone());
        self.rows(1, rows);
        self.namespace_end(1, true);
        self.end();
    }

    /// An audit that finds `rows` in namespace 1.
    fn audit(&mut self, rows: Vec<Row>) {
        self.begin(Trigger::Interval);
        self.namespace(1, rows);
        self.end();
    }

    /// The laws that hold at every moment.
    fn check(&self) {
        let snapshot = self.fold.snapshot();
        let mut flows = [Flow::default(); 2];
        for flow in snapshot.countries.iter().flat_map(|row| &row.flows) {
            add(&mut flows[0], flow);
        }
        for row in &snapshot.ports {
            add(&mut flows[1], &row.flow);
        }
        assert_eq!(flows[0], flows[1], "countries and ports agree");
        assert_eq!(flows[0].connections, snapshot.established);
        let corrections = snapshot.corrections;
        if snapshot.table_overflow == 0 {
            assert_eq!(
                flows[0].opened + corrections.seeded + corrections.added,
                flows[0].closed + corrections.removed + snapshot.tracked,
                "the law of connections"
            );
        }
        assert!(snapshot.established <= snapshot.tracked);
    }

    fn country(&self, code: &str) -> CountryRow {
        self.fold
            .snapshot()
            .countries
            .into_iter()
            .find(|row| row.country.code() == code)
            .unwrap_or_else(|| panic!("{code} was never seen"))
    }

    fn port(&self, port: u16, direction: Direction) -> Option<PortRow> {
        self.fold
            .snapshot()
            .ports
            .into_iter()
            .find(|row| row.port == PortLabel::Port(port) && row.direction == direction)
    }

    fn other(&self, direction: Direction) -> PortRow {
        self.fold
            .snapshot()
            .ports
            .into_iter()
            .find(|row| row.port == PortLabel::Other && row.direction == direction)
            .unwrap()
    }
}

fn add(sum: &mut Flow, flow: &Flow) {
    sum.connections += flow.connections;
    sum.opened += flow.opened;
    sum.closed += flow.closed;
    sum.received_bytes += flow.received_bytes;
    sum.sent_bytes += flow.sent_bytes;
    sum.retransmitted_segments += flow.retransmitted_segments;
}

fn socket(id: SocketId, cookie: Cookie) -> Socket {
    Socket {
        id,
        cookie,
        netns: 1,
    }
}

/// 10.0.0.1:`local_port` → `remote`.
fn tuple(local_port: u16, remote: &str) -> Tuple {
    let remote: std::net::SocketAddr = remote.parse().unwrap();
    let local = match remote {
        std::net::SocketAddr::V4(_) => "10.0.0.1",
        std::net::SocketAddr::V6(_) => "fd00::1",
    };
    Tuple {
        local: local.parse().unwrap(),
        local_port,
        remote: remote.ip(),
        remote_port: remote.port(),
    }
}

fn row(state: u8, tuple: Tuple, cookie: Cookie) -> Row {
    Row {
        state,
        tuple,
        cookie,
        inode: 1,
        id: 0,
        receive_queue: 0,
        send_queue: 0,
        traffic: None,
        owner: Owner::default(),
    }
}

fn listen_row(port: u16) -> Row {
    let mut row = row(LISTEN, tuple(port, "0.0.0.0:0"), 0);
    row.tuple.local = "0.0.0.0".parse().unwrap();
    row
}

fn stats(received: u64, sent: u64, retransmitted: u32, srtt_us: u32) -> Traffic {
    Traffic {
        received_bytes: received,
        sent_bytes: sent,
        retransmitted_segments: retransmitted,
        srtt_us,
    }
}
