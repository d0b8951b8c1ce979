//! Decodes the records of `connmon_common::wire`, field by field.

use std::fmt;
use std::mem::{offset_of, size_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use connmon_common::state;
use connmon_common::wire::{
    self, Change, Close, Connect, EndsV4, EndsV6, Head, Listen, Live, Open, Stats, Task, flag, kind,
};

use super::{Cookie, Event, Owner, Socket, SocketId, Traffic, Tuple};

/// Why a record cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undecodable {
    /// Shorter than any record, in bytes.
    Short(usize),
    /// No such kind.
    Kind(u8),
    /// Unknown flag bits.
    Flags(u8),
    /// Not the length of this kind.
    Length {
        /// Kind.
        kind: u8,
        /// Bytes.
        len: usize,
    },
    /// Not a pair of TCP states.
    States {
        /// State left.
        old: u8,
        /// State entered.
        new: u8,
    },
}

impl fmt::Display for Undecodable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short(len) => write!(f, "record of {len} bytes is too short"),
            Self::Kind(kind) => write!(f, "record of unknown kind {kind}"),
            Self::Flags(flags) => write!(f, "record with unknown flags {flags:#x}"),
            Self::Length { kind, len } => write!(f, "record of kind {kind} with {len} bytes"),
            Self::States { old, new } => write!(f, "record with states {old} and {new}"),
        }
    }
}

impl std::error::Error for Undecodable {}

/// Decodes one record. Never panics, whatever the bytes.
///
/// # Errors
///
/// The first thing that is wrong with the record.
pub fn decode(record: &[u8]) -> Result<Event, Undecodable> {
    if record.len() < size_of::<Head>() {
        return Err(Undecodable::Short(record.len()));
    }
    let bytes = Bytes(record);
    let [kind, flags, old, new] = bytes.array(0);
    if flags & !flag::ALL != 0 {
        return Err(Undecodable::Flags(flags));
    }
    let len = record.len();
    if record_len(kind, flags & flag::V6 != 0).ok_or(Undecodable::Kind(kind))? != len {
        return Err(Undecodable::Length { kind, len });
    }
    let has_states = !matches!(kind, kind::CONNECT_SENT | kind::ACCEPT);
    let states = state::ESTABLISHED..=state::NEW_SYN_RECV;
    if has_states && !(states.contains(&old) && states.contains(&new)) {
        return Err(Undecodable::States { old, new });
    }
    Ok(event(&bytes, kind, flags, old, new))
}

/// Bytes of a record in the ring; `None` if there is no such kind.
fn record_len(kind: u8, v6: bool) -> Option<usize> {
    let (v4_len, v6_len) = match kind {
        kind::CONNECT => (size_of::<Connect<EndsV4>>(), size_of::<Connect<EndsV6>>()),
        kind::OPEN => (size_of::<Open<EndsV4>>(), size_of::<Open<EndsV6>>()),
        kind::CHANGE | kind::UNLISTEN | kind::RESTORE => {
            (size_of::<Change<EndsV4>>(), size_of::<Change<EndsV6>>())
        }
        kind::CLOSE => (size_of::<Close<EndsV4>>(), size_of::<Close<EndsV6>>()),
        kind::LISTEN => (size_of::<Listen<EndsV4>>(), size_of::<Listen<EndsV6>>()),
        kind::CONNECT_SENT | kind::ACCEPT => (size_of::<Task>(), size_of::<Task>()),
        _ => return None,
    };
    Some(if v6 { v6_len } else { v4_len })
}

/// The event of a valid record. The offsets before the endpoints do not depend
/// on the family, as connmon-common asserts.
fn event(bytes: &Bytes<'_>, kind: u8, flags: u8, old: u8, new: u8) -> Event {
    let ends = |at| bytes.ends(at, flags & flag::V6 != 0);
    let id = bytes.u64(offset_of!(Head, id));
    let socket = Socket {
        id,
        cookie: bytes.u64(offset_of!(Head, cookie)),
        netns: bytes.u32(offset_of!(Head, netns)),
    };
    match kind {
        kind::CONNECT => Event::Connect {
            socket,
            at_ns: bytes.u64(offset_of!(Connect<EndsV4>, at_ns)),
            tuple: ends(offset_of!(Connect<EndsV4>, ends)),
            owner: bytes.owner(offset_of!(Connect<EndsV4>, owner)),
        },
        kind::OPEN => Event::Open {
            socket,
            at_ns: bytes.u64(offset_of!(Open<EndsV4>, at_ns)),
            tuple: ends(offset_of!(Open<EndsV4>, ends)),
            old,
            new,
        },
        kind::CHANGE => Event::Change {
            socket,
            tuple: ends(offset_of!(Change<EndsV4>, ends)),
            old,
            new,
        },
        kind::RESTORE => Event::Restore {
            socket,
            tuple: ends(offset_of!(Change<EndsV4>, ends)),
        },
        kind::CLOSE => {
            let stats = offset_of!(Close<EndsV4>, stats);
            let field = |at| (flags & flag::ERROR != 0).then(|| bytes.u32(stats + at));
            Event::Close {
                socket,
                at_ns: bytes.u64(offset_of!(Close<EndsV4>, at_ns)),
                tuple: ends(offset_of!(Close<EndsV4>, ends)),
                old,
                error: field(offset_of!(Stats, error)).unwrap_or(0),
                segments_out: field(offset_of!(Stats, segments_out)),
                shut_down: flags & flag::SHUT_DOWN != 0,
                traffic: bytes.traffic(stats, flags),
            }
        }
        kind::LISTEN => {
            let tuple = ends(offset_of!(Listen<EndsV4>, ends));
            Event::Listen {
                socket,
                address: tuple.local,
                port: tuple.local_port,
                owner: bytes.owner(offset_of!(Listen<EndsV4>, owner)),
            }
        }
        kind::UNLISTEN => {
            let tuple = ends(offset_of!(Change<EndsV4>, ends));
            Event::Unlisten {
                socket,
                address: tuple.local,
                port: tuple.local_port,
            }
        }
        kind::CONNECT_SENT => Event::ConnectSent {
            id,
            at_ns: bytes.u64(offset_of!(Task, at_ns)),
            owner: bytes.owner(offset_of!(Task, owner)),
        },
        _ => Event::Accept {
            id,
            at_ns: bytes.u64(offset_of!(Task, at_ns)),
            owner: bytes.owner(offset_of!(Task, owner)),
        },
    }
}

/// A socket, as the walk over the kernel's socket table reads it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LiveSocket {
    /// TCP state; SYN_RECV for a request socket as well.
    pub state: u8,
    /// Address of the kernel's `struct sock`, or of the request socket.
    pub id: SocketId,
    /// Cookie.
    pub cookie: Cookie,
    /// Endpoints.
    pub tuple: Tuple,
    /// Bytes, retransmissions and RTT so far; `None` for a request socket.
    pub traffic: Option<Traffic>,
}

/// Decodes a [`Live`] record, which may be followed by other bytes. Never panics,
/// whatever the bytes.
///
/// # Errors
///
/// The first thing that is wrong with the record.
pub fn decode_live(slot: &[u8]) -> Result<LiveSocket, Undecodable> {
    let bytes = Bytes(slot);
    let [kind, flags, old, new] = bytes.array(0);
    let v6 = flags & flag::V6 != 0;
    let length = match v6 {
        true => size_of::<Live<EndsV6>>(),
        false => size_of::<Live<EndsV4>>(),
    };
    if slot.len() < length {
        return Err(Undecodable::Short(slot.len()));
    }
    if kind != kind::LIVE {
        return Err(Undecodable::Kind(kind));
    }
    if flags & !(flag::V6 | flag::TRAFFIC) != 0 {
        return Err(Undecodable::Flags(flags));
    }
    let left_out = matches!(new, state::TIME_WAIT | state::CLOSE | state::LISTEN);
    if old != new || left_out || !(state::ESTABLISHED..=state::CLOSING).contains(&new) {
        return Err(Undecodable::States { old, new });
    }
    Ok(LiveSocket {
        state: new,
        id: bytes.u64(offset_of!(Head, id)),
        cookie: bytes.u64(offset_of!(Head, cookie)),
        tuple: bytes.ends(offset_of!(Live<EndsV4>, ends), v6),
        traffic: bytes.traffic(offset_of!(Live<EndsV4>, stats), flags),
    })
}

/// The bytes of a record. A read past the end gives zeroes, so that a wrong
/// offset cannot panic.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        match self.0.get(at..).and_then(<[u8]>::first_chunk) {
            Some(chunk) => *chunk,
            None => [0; N],
        }
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_ne_bytes(self.array(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.array(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.array(at))
    }

    fn ends(&self, at: usize, v6: bool) -> Tuple {
        if v6 {
            Tuple {
                local: self.ipv6(at + offset_of!(EndsV6, local)),
                local_port: self.u16(at + offset_of!(EndsV6, local_port)),
                remote: self.ipv6(at + offset_of!(EndsV6, remote)),
                remote_port: self.u16(at + offset_of!(EndsV6, remote_port)),
            }
        } else {
            Tuple {
                local: self.ipv4(at + offset_of!(EndsV4, local)),
                local_port: self.u16(at + offset_of!(EndsV4, local_port)),
                remote: self.ipv4(at + offset_of!(EndsV4, remote)),
                remote_port: self.u16(at + offset_of!(EndsV4, remote_port)),
            }
        }
    }

    fn ipv4(&self, at: usize) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from(self.array::<4>(at)))
    }

    /// v4-mapped addresses unmapped: a listener may be bound to one.
    fn ipv6(&self, at: usize) -> IpAddr {
        Ipv6Addr::from(self.array::<16>(at)).to_canonical()
    }

    fn owner(&self, at: usize) -> Owner {
        Owner {
            pid: self.u32(at + offset_of!(wire::Owner, pid)),
            comm: name(self.array(at + offset_of!(wire::Owner, comm))),
            cgroup: self.u64(at + offset_of!(wire::Owner, cgroup)),
        }
    }

    fn traffic(&self, at: usize, flags: u8) -> Option<Traffic> {
        (flags & flag::TRAFFIC != 0).then(|| Traffic {
            received_bytes: self.u64(at + offset_of!(Stats, received_bytes)),
            sent_bytes: self.u64(at + offset_of!(Stats, sent_bytes)),
            retransmitted_segments: self.u32(at + offset_of!(Stats, retransmitted_segments)),
            srtt_us: self.u32(at + offset_of!(Stats, srtt_us)),
        })
    }
}

/// Zeroes what follows the first NUL: the kernel leaves old bytes there, and a
/// process must have one name.
fn name(mut comm: [u8; 16]) -> [u8; 16] {
    if let Some(end) = comm.iter().position(|&byte| byte == 0) {
        comm[end..].fill(0);
    }
    comm
}

#[cfg(test)]
mod tests {
    use super::*;
    use connmon_common::wire::MAX_RECORD_BYTES;
    use proptest::prelude::*;

    /// A record as the program writes it, piece by piece in layout order.
    struct Record(Vec<u8>);

    impl Record {
        fn new(kind: u8, flags: u8, old: u8, new: u8) -> Self {
            let mut bytes = vec![kind, flags, old, new];
            bytes.extend(4_026_531_840_u32.to_ne_bytes());
            bytes.extend(0xffff_8880_1234_5678_u64.to_ne_bytes());
            bytes.extend(0x30e216_u64.to_ne_bytes());
            Self(bytes)
        }

        fn u64(mut self, value: u64) -> Self {
            self.0.extend(value.to_ne_bytes());
            self
        }

        fn u32(mut self, value: u32) -> Self {
            self.0.extend(value.to_ne_bytes());
            self
        }

        /// With bytes after the end of the name, as 6.1 leaves them.
        fn owner(mut self) -> Self {
            self.0.extend(7_u64.to_ne_bytes());
            self.0.extend(b"curl\0\0\0@\0-1\0\0\0\0\xff");
            self.u32(4321).u32(0)
        }

        fn v4(mut self) -> Self {
            self.0.extend([10, 0, 0, 1, 203, 0, 113, 9]);
            self.ports()
        }

        fn v6(mut self, local: Ipv6Addr) -> Self {
            self.0.extend(local.octets());
            self.0
                .extend("2001:db8::9".parse::<Ipv6Addr>().unwrap().octets());
            self.ports()
        }

        fn ports(mut self) -> Self {
            self.0.extend(40000_u16.to_ne_bytes());
            self.0.extend(443_u16.to_ne_bytes());
            self.u32(0)
        }
    }

    const SOCKET: Socket = Socket {
        id: 0xffff_8880_1234_5678,
        cookie: 0x30e216,
        netns: 4_026_531_840,
    };

    fn tuple_v4() -> Tuple {
        Tuple {
            local: "10.0.0.1".parse().unwrap(),
            local_port: 40000,
            remote: "203.0.113.9".parse().unwrap(),
            remote_port: 443,
        }
    }

    fn owner() -> Owner {
        Owner {
            pid: 4321,
            comm: *b"curl\0\0\0\0\0\0\0\0\0\0\0\0",
            cgroup: 7,
        }
    }

    #[test]
    fn every_kind_decodes_to_its_event() {
        let connect = Record::new(kind::CONNECT, 0, 7, 2).u64(5).owner().v4();
        assert_eq!(
            decode(&connect.0),
            Ok(Event::Connect {
                socket: SOCKET,
                at_ns: 5,
                tuple: tuple_v4(),
                owner: owner(),
            })
        );
        let local = "2001:db8::1".parse::<Ipv6Addr>().unwrap();
        let open = Record::new(kind::OPEN, flag::V6, 3, 1).u64(6).v6(local);
        let tuple = Tuple {
            local: IpAddr::V6(local),
            remote: "2001:db8::9".parse().unwrap(),
            ..tuple_v4()
        };
        assert_eq!(
            decode(&open.0),
            Ok(Event::Open {
                socket: SOCKET,
                at_ns: 6,
                tuple,
                old: 3,
                new: 1,
            })
        );
        let change = Record::new(kind::CHANGE, 0, 1, 8).v4();
        assert_eq!(
            decode(&change.0),
            Ok(Event::Change {
                socket: SOCKET,
                tuple: tuple_v4(),
                old: 1,
                new: 8,
            })
        );
        let restore = Record::new(kind::RESTORE, 0, 2, 1).v4();
        assert_eq!(
            decode(&restore.0),
            Ok(Event::Restore {
                socket: SOCKET,
                tuple: tuple_v4(),
            })
        );
        let unlisten = Record::new(kind::UNLISTEN, 0, 10, 7).v4();
        assert_eq!(
            decode(&unlisten.0),
            Ok(Event::Unlisten {
                socket: SOCKET,
                address: tuple_v4().local,
                port: 40000,
            })
        );
        let mapped = "::ffff:10.0.0.1".parse::<Ipv6Addr>().unwrap();
        let listen = Record::new(kind::LISTEN, flag::V6, 7, 10)
            .owner()
            .v6(mapped);
        assert_eq!(
            decode(&listen.0),
            Ok(Event::Listen {
                socket: SOCKET,
                address: tuple_v4().local,
                port: 40000,
                owner: owner(),
            })
        );
        for (kind, sent) in [(kind::ACCEPT, false), (kind::CONNECT_SENT, true)] {
            let record = Record::new(kind, 0, 0, 0).u64(9).owner();
            let (id, at_ns, owner) = (SOCKET.id, 9, owner());
            let expected = if sent {
                Event::ConnectSent { id, at_ns, owner }
            } else {
                Event::Accept { id, at_ns, owner }
            };
            assert_eq!(decode(&record.0), Ok(expected));
        }
    }

    #[test]
    fn close_has_what_its_flags_allow() {
        let close = |flags| {
            let record = Record::new(kind::CLOSE, flags, 9, 7).u64(8);
            let stats = record.u64(1000).u64(500).u32(2).u32(250).u32(12).u32(104);
            decode(&stats.v4().0).unwrap()
        };
        let expected = |error, segments_out, shut_down, traffic| Event::Close {
            socket: SOCKET,
            at_ns: 8,
            tuple: tuple_v4(),
            old: 9,
            error,
            segments_out,
            shut_down,
            traffic,
        };
        let traffic = Traffic {
            received_bytes: 1000,
            sent_bytes: 500,
            retransmitted_segments: 2,
            srtt_us: 250,
        };
        assert_eq!(close(0), expected(0, None, false, None));
        assert_eq!(close(flag::ERROR), expected(104, Some(12), false, None));
        assert_eq!(
            close(flag::ERROR | flag::TRAFFIC),
            expected(104, Some(12), false, Some(traffic))
        );
        assert_eq!(
            close(flag::ERROR | flag::SHUT_DOWN),
            expected(104, Some(12), true, None)
        );
    }

    #[test]
    fn errors_name_what_is_wrong() {
        assert_eq!(decode(&[]), Err(Undecodable::Short(0)));
        assert_eq!(
            decode(&Record::new(0, 0, 1, 1).v4().0),
            Err(Undecodable::Kind(0))
        );
        assert_eq!(
            decode(&Record::new(kind::OPEN, 0x80, 3, 1).u64(0).v4().0),
            Err(Undecodable::Flags(0x80))
        );
        assert_eq!(
            decode(&Record::new(kind::CHANGE, 0, 0, 13).v4().0),
            Err(Undecodable::States { old: 0, new: 13 })
        );
        // A v4 record that claims to be v6.
        assert_eq!(
            decode(&Record::new(kind::CHANGE, flag::V6, 1, 8).v4().0),
            Err(Undecodable::Length {
                kind: kind::CHANGE,
                len: 40
            })
        );
    }

    #[test]
    fn live_record_decodes_or_is_refused() {
        let stats = |record: Record| record.u64(10).u64(20).u32(3).u32(40).u32(0).u32(0);
        let local = "2001:db8::1".parse::<Ipv6Addr>().unwrap();
        let v6 = stats(Record::new(kind::LIVE, flag::V6 | flag::TRAFFIC, 1, 1)).v6(local);
        let socket = decode_live(&v6.0).unwrap();
        assert_eq!((socket.state, socket.cookie), (1, SOCKET.cookie));
        assert_eq!(socket.tuple.local, IpAddr::V6(local));
        assert_eq!(socket.traffic.unwrap().sent_bytes, 20);
        assert_eq!(decode_live(&v6.0[..95]), Err(Undecodable::Short(95)));
        // In a slot for the longer record.
        let mut v4 = stats(Record::new(kind::LIVE, 0, 3, 3)).v4().0;
        v4.resize(96, 0xff);
        let socket = decode_live(&v4).unwrap();
        assert_eq!((socket.state, socket.traffic), (3, None));
        assert_eq!(socket.tuple, tuple_v4());
        for (kind, flags, old, new) in [
            (kind::OPEN, 0, 1, 1),
            (kind::LIVE, flag::ERROR, 1, 1),
            (kind::LIVE, 0, 1, 4),
            (kind::LIVE, 0, 6, 6),
            (kind::LIVE, 0, 12, 12),
        ] {
            let record = stats(Record::new(kind, flags, old, new)).v4();
            assert!(
                decode_live(&record.0).is_err(),
                "{kind} {flags} {old} {new}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_slot_decodes_or_is_refused(
            kind in 8_u8..10, flags in 0_u8..16, old in 0_u8..14, new in 0_u8..14,
            tail in prop::collection::vec(any::<u8>(), 0..=MAX_RECORD_BYTES),
        ) {
            let mut slot = Record::new(kind, flags, old, new).0;
            slot.extend(tail);
            let _ = decode_live(&slot);
        }

        #[test]
        fn any_bytes_decode_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..=MAX_RECORD_BYTES + 8)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn any_kind_flags_and_length_decode_or_are_refused(
            kind in 0_u8..12, flags in 0_u8..16, old in 0_u8..14, new in 0_u8..14,
            tail in prop::collection::vec(any::<u8>(), 0..=MAX_RECORD_BYTES),
        ) {
            let mut record = Record::new(kind, flags, old, new).0;
            record.extend(tail);
            if let Ok(event) = decode(&record) {
                // No event has a v4-mapped address.
                let mapped = |address: IpAddr| matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
                if let Event::Open { tuple, .. } | Event::Close { tuple, .. } = event {
                    prop_assert!(!mapped(tuple.local) && !mapped(tuple.remote));
                }
            }
        }
    }
}
