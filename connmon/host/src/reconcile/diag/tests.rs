use proptest::prelude::*;

use connmon_common::state;
use connmon_core::event::Traffic;

use super::message::*;
use super::*;
use crate::reconcile::Parsed;
use crate::reconcile::parsed::show;

mod overrun;
mod scripted;

const INET: &[u8] = include_bytes!("../../../../fixtures/diag/inet");
const INET6: &[u8] = include_bytes!("../../../../fixtures/diag/inet6");
const INET_INFO: &[u8] = include_bytes!("../../../../fixtures/diag/inet-info");
/// What the recording asked with.
const SEQUENCE: u32 = 7;

/// A recording is a series of datagrams with their lengths before them.
fn datagrams(mut recording: &[u8]) -> Vec<&[u8]> {
    let mut datagrams = Vec::new();
    while let Some((length, rest)) = recording.split_first_chunk() {
        let (datagram, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        datagrams.push(datagram);
        recording = rest;
    }
    datagrams
}

fn rows(recording: &[u8]) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut last = Datagram::default();
    for datagram in datagrams(recording) {
        assert!(!last.done);
        last = parse_datagram(datagram, SEQUENCE, &mut |row| {
            rows.push(row);
            true
        });
        assert_eq!((last.error, last.undecodable), (None, 0));
    }
    assert!(last.done && !last.interrupted);
    rows
}

fn parse_one(datagram: &[u8]) -> (Datagram, Vec<Row>) {
    let mut rows = Vec::new();
    let outcome = parse_datagram(datagram, SEQUENCE, &mut |row| {
        rows.push(row);
        true
    });
    (outcome, rows)
}

fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(((HEADER_BYTES + payload.len()) as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(SEQUENCE.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(align(bytes.len()), 0);
    bytes
}

/// A diag message with an INFO attribute that holds this `tcp_info`.
fn with_info(state: u8, info: &[u8]) -> Vec<u8> {
    let mut payload = vec![0; DIAG_MESSAGE_BYTES];
    payload[0] = AF_INET;
    payload[1] = state;
    payload.extend(5_u16.to_ne_bytes()); // another attribute before it
    payload.extend(8_u16.to_ne_bytes());
    payload.extend([0; 4]);
    payload.extend(((4 + info.len()) as u16).to_ne_bytes());
    payload.extend(INET_DIAG_INFO.to_ne_bytes());
    payload.extend(info);
    payload
}

/// Of a socket without anything in transit.
fn info(received: u64, acked: u64, segments: u32, rtt: u32) -> Vec<u8> {
    let (sent, retransmitted) = (acked + 10_000, 1_000_u64);
    let mut info = vec![0xaa; 248];
    info[TCPI_UNACKED..][..4].fill(0);
    info[TCPI_NOTSENT_BYTES..][..4].fill(0);
    info[TCPI_BYTES_ACKED..][..8].copy_from_slice(&acked.to_ne_bytes());
    info[TCPI_BYTES_RECEIVED..][..8].copy_from_slice(&received.to_ne_bytes());
    info[TCPI_BYTES_SENT..][..8].copy_from_slice(&sent.to_ne_bytes());
    info[TCPI_BYTES_RETRANS..][..8].copy_from_slice(&retransmitted.to_ne_bytes());
    info[TCPI_TOTAL_RETRANS..][..4].copy_from_slice(&segments.to_ne_bytes());
    info[TCPI_RTT..][..4].copy_from_slice(&rtt.to_ne_bytes());
    info
}

#[cfg(target_endian = "little")]
#[test]
fn recorded_dumps_read_as_ss_showed_them() {
    for (recording, expected) in [
        (
            INET,
            include_str!("../../../../fixtures/diag/inet.expected"),
        ),
        (
            INET6,
            include_str!("../../../../fixtures/diag/inet6.expected"),
        ),
    ] {
        let shown: Vec<_> = rows(recording)
            .iter()
            .map(|row| format!("{} {}", show(row), row.cookie))
            .collect();
        assert_eq!(shown, expected.lines().collect::<Vec<_>>());
        assert!(rows(recording).iter().all(|row| row.traffic.is_none()));
    }
}

#[cfg(target_endian = "little")]
#[test]
fn recorded_counters_are_payload_alone() {
    let rows = rows(INET_INFO);
    let counters = |port: u16, state: u8| -> Vec<_> {
        rows.iter()
            .filter(|row| row.tuple.local_port == port && row.state == state)
            .map(|row| {
                let traffic = row.traffic.unwrap();
                let active = state != state::CLOSE_WAIT && port != 8080;
                (traffic.received_bytes, traffic.sent_payload(active))
            })
            .collect()
    };
    // 321 bytes were sent from port 8080, on the second of two children.
    assert_eq!(counters(8080, state::ESTABLISHED), [(0, 0), (0, 321)]);
    assert_eq!(counters(50494, state::ESTABLISHED), [(321, 0)]);
    // The kernel reads 1 here, for the peer's FIN.
    assert_eq!(counters(8081, state::CLOSE_WAIT), [(0, 0)]);
    assert_eq!(counters(57534, state::FIN_WAIT2), [(0, 0)]);
    for row in &rows {
        let opened = States::OPEN.has(row.state);
        assert_eq!(row.traffic.is_some(), opened, "{}", show(row));
    }
}

#[test]
fn counters_come_from_their_offsets_all_or_none() {
    let full = info(1_000, 3_552, 3, 250);
    let counters = |state, info: &[u8]| match parse_message(&with_info(state, info)) {
        Parsed::Row(row) => row.traffic,
        other => panic!("{other:?}"),
    };
    let expected = Traffic {
        received_bytes: 1_000,
        sent_bytes: 3_552,
        retransmitted_segments: 3,
        srtt_us: 250,
    };
    // Whether the peer's FIN is among what was received, and ours among
    // what was sent.
    for (state, theirs, ours) in [
        (1, 0, 0),
        (4, 0, 1),
        (5, 0, 1),
        (8, 1, 0),
        (9, 1, 1),
        (11, 1, 1),
    ] {
        let expected = Traffic {
            received_bytes: 1_000 - theirs,
            sent_bytes: 3_552 - ours,
            ..expected
        };
        assert_eq!(counters(state, &full), Some(expected), "{state}");
    }
    for state in [2, 3, 10] {
        assert_eq!(counters(state, &full), None);
    }
    for length in 0..TCPI_BYTES_RETRANS + 8 {
        assert_eq!(counters(1, &full[..length]), None, "{length}");
    }
    assert_eq!(counters(1, &full[..TCPI_BYTES_RETRANS + 8]), Some(expected));
}

#[test]
fn sent_is_what_was_acknowledged_or_is_in_transit() {
    let sent = |state, queued: u32, unsent: u32, unacked: u32, transmitted: u64| {
        let mut info = info(0, 10_000, 0, 0);
        info[TCPI_NOTSENT_BYTES..][..4].copy_from_slice(&unsent.to_ne_bytes());
        info[TCPI_UNACKED..][..4].copy_from_slice(&unacked.to_ne_bytes());
        info[TCPI_BYTES_SENT..][..8].copy_from_slice(&transmitted.to_ne_bytes());
        info[TCPI_BYTES_RETRANS..][..8].fill(0);
        traffic(state, queued, &info).unwrap().sent_bytes
    };
    // A queue of ours dropped half of what was transmitted.
    assert_eq!(sent(1, 5_000, 2_000, 3, 26_000), 13_000);
    // A FIN waits behind what is not sent, or has been sent.
    assert_eq!(sent(4, 5_000, 2_000, 3, 26_000), 13_000);
    assert_eq!(sent(4, 3_001, 0, 3, 26_000), 13_000);
    // All was acknowledged after the queue was read.
    assert_eq!(sent(1, 5_000, 0, 0, 26_000), 10_000);
    // Some was, and nothing was dropped: at most that and a SYN.
    assert_eq!(sent(1, 5_000, 0, 1, 11_000), 11_001);
}

#[test]
fn minisocks_and_unknown_states_give_no_rows() {
    let mut payload = vec![0; DIAG_MESSAGE_BYTES];
    payload[0] = AF_INET;
    for (state, timer, expected) in [
        (6, 3, Parsed::LeftOut),
        (5, 3, Parsed::LeftOut),
        (7, 0, Parsed::LeftOut),
        (0, 0, Parsed::Undecodable),
        (12, 0, Parsed::Undecodable),
        (13, 0, Parsed::Undecodable),
        (255, 0, Parsed::Undecodable),
    ] {
        payload[1] = state;
        payload[2] = timer;
        assert_eq!(parse_message(&payload), expected, "{state} {timer}");
    }
    payload[1] = 1;
    payload[2] = 0;
    assert!(matches!(parse_message(&payload), Parsed::Row(_)));
    payload[0] = 1;
    assert_eq!(parse_message(&payload), Parsed::Undecodable);
    assert_eq!(parse_message(&payload[..71]), Parsed::Undecodable);
}

#[test]
fn no_cookie_is_no_cookie() {
    let mut payload = vec![0; DIAG_MESSAGE_BYTES];
    payload[..2].copy_from_slice(&[AF_INET, 1]);
    payload[44..52].fill(0xff);
    let Parsed::Row(row) = parse_message(&payload) else {
        panic!("not a row");
    };
    assert_eq!(row.cookie, 0);
}

#[test]
fn done_error_and_overrun_end_a_dump() {
    let (done, _) = parse_one(&message(NLMSG_DONE, 0, &0_i32.to_ne_bytes()));
    assert_eq!(
        done,
        Datagram {
            done: true,
            ..Datagram::default()
        }
    );
    let (empty, _) = parse_one(&message(NLMSG_DONE, 0, &[]));
    assert_eq!(
        empty,
        Datagram {
            done: true,
            ..Datagram::default()
        }
    );

    let refused = message(NLMSG_ERROR, 0, &(-libc::ENOENT).to_ne_bytes());
    let (refused, _) = parse_one(&refused);
    assert_eq!((refused.done, refused.error), (true, Some(libc::ENOENT)));
    let (failed, _) = parse_one(&message(NLMSG_DONE, 0, &(-libc::ENOMEM).to_ne_bytes()));
    assert_eq!((failed.done, failed.error), (true, Some(libc::ENOMEM)));
    let (lowest, _) = parse_one(&message(NLMSG_ERROR, 0, &i32::MIN.to_ne_bytes()));
    assert_eq!(lowest.error, Some(i32::MAX));

    let (overrun, _) = parse_one(&message(NLMSG_OVERRUN, 0, &[]));
    assert_eq!((overrun.done, overrun.error), (true, Some(libc::ENOBUFS)));
}

#[test]
fn an_interrupted_dump_is_reported() {
    let payload = with_info(1, &[]);
    let mut bytes = message(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP_INTR, &payload);
    bytes.extend(message(SOCK_DIAG_BY_FAMILY, 0, &payload));
    let (outcome, rows) = parse_one(&bytes);
    assert!(outcome.interrupted && !outcome.done);
    assert_eq!(rows.len(), 2);
}

#[test]
fn answers_to_another_request_are_ignored() {
    let payload = with_info(1, &[]);
    let mut bytes = message(SOCK_DIAG_BY_FAMILY, 0, &payload);
    bytes.extend(message(NLMSG_DONE, 0, &[0; 4]));
    let stale = parse_datagram(&bytes, SEQUENCE + 1, &mut |_| panic!("a stale row"));
    assert_eq!(stale, Datagram::default());
}

#[test]
fn a_broken_message_is_counted_and_skipped() {
    let mut bytes = message(SOCK_DIAG_BY_FAMILY, 0, &with_info(1, &[]));
    bytes.extend(message(SOCK_DIAG_BY_FAMILY, 0, &[1, 2, 3])); // short: skipped
    bytes.extend(message(77, 0, &[])); // unknown kind: skipped
    bytes.extend(message(SOCK_DIAG_BY_FAMILY, 0, &with_info(2, &[])));
    bytes.extend([9, 0, 0, 0, 20]); // no header: the end
    let (outcome, rows) = parse_one(&bytes);
    assert_eq!(rows.len(), 2);
    assert_eq!(
        outcome,
        Datagram {
            undecodable: 3,
            ..Datagram::default()
        }
    );
}

#[test]
fn the_request_is_what_the_kernel_reads() {
    let states = States::LISTEN.and(States::OPENING).and(States::OPEN);
    for state in [0, 6, 7, 12, 13, 31, 32, 255] {
        assert!(!states.has(state), "{state}");
    }
    // struct inet_diag_req: family, prefixes, extensions, 48 bytes, states.
    let request = request(states, true, 9);
    assert_eq!(
        (request.len(), request[..6].to_vec()),
        (76, vec![76, 0, 0, 0, 18, 0])
    );
    assert_eq!(request[16..20], [0, 0, 0, 2]);
    // 1 to 5 and 8 to 11; neither TIME_WAIT, CLOSE, NEW_SYN_RECV nor
    // BOUND_INACTIVE.
    assert_eq!(request[68..72], 0b1111_0011_1110_u32.to_ne_bytes());
    assert!(
        request[20..68]
            .iter()
            .chain(&request[72..])
            .all(|&byte| byte == 0)
    );
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = parse_one(&bytes);
        let _ = parse_message(&bytes);
    }

    #[test]
    fn recordings_survive_cuts_and_flips(
        cut in 0_usize..6_000,
        flips in proptest::collection::vec((0_usize..6_000, any::<u8>()), 0..8),
    ) {
        for recording in [INET, INET6, INET_INFO] {
            let mut datagram = datagrams(recording)[0].to_vec();
            let whole = parse_one(&datagram).1.len();
            for &(at, byte) in &flips {
                if let Some(place) = datagram.get_mut(at) {
                    *place = byte;
                }
            }
            datagram.truncate(cut);
            // A flipped length can make rows of attributes, never more
            // than the bytes could hold.
            let (_, rows) = parse_one(&datagram);
            prop_assert!(rows.len() <= datagram.len() / (HEADER_BYTES + DIAG_MESSAGE_BYTES));
            if flips.is_empty() {
                prop_assert!(rows.len() <= whole);
            }
        }
    }
}
