//! How dumps end when the kernel does not answer as it should: a script answers
//! in its place.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use rustix::io::Errno;

use super::super::message::*;
use super::super::*;
use super::*;

/// What one receive gives.
enum Step {
    /// Messages to the last request, in one datagram.
    Answer(Vec<Message>),
    /// As above, of which only so many bytes fit.
    Cut(Vec<Message>, usize),
    /// As above, sent by another process.
    Forged(Vec<Message>),
    /// Messages to the request before the last one.
    Stale(Vec<Message>),
    /// What is there without waiting, of the last request.
    Left(Vec<Message>),
    /// As above, an error.
    LeftError(Errno),
    Error(Errno),
}

/// Kind, flags, payload.
type Message = (u16, u16, Vec<u8>);

struct Script {
    steps: RefCell<VecDeque<Step>>,
    /// Number of the last request.
    sequence: Cell<u32>,
    requests: Cell<usize>,
}

impl Channel for Script {
    fn send(&self, request: &[u8]) -> rustix::io::Result<()> {
        self.sequence.set(read_u32(request, 8).unwrap());
        self.requests.set(self.requests.get() + 1);
        Ok(())
    }

    fn receive(&self, buffer: &mut [u8], wait: bool) -> rustix::io::Result<Received> {
        let mut steps = self.steps.borrow_mut();
        let is_left = matches!(steps.front(), Some(Step::Left(_) | Step::LeftError(_)));
        assert!(!wait || !is_left, "waited for what was there");
        if !wait && !is_left {
            return Err(Errno::AGAIN);
        }
        let step = steps.pop_front();
        let sequence = self.sequence.get();
        let (bytes, fit, from_kernel) = match step.expect("read beyond the script") {
            Step::Answer(messages) | Step::Left(messages) => {
                (datagram(&messages, sequence), usize::MAX, true)
            }
            Step::Cut(messages, fit) => (datagram(&messages, sequence), fit, true),
            Step::Forged(messages) => (datagram(&messages, sequence), usize::MAX, false),
            Step::Stale(messages) => (datagram(&messages, sequence - 1), usize::MAX, true),
            Step::Error(errno) | Step::LeftError(errno) => return Err(errno),
        };
        let read = bytes.len().min(fit).min(buffer.len());
        buffer[..read].copy_from_slice(&bytes[..read]);
        Ok(Received {
            read,
            length: bytes.len(),
            from_kernel,
        })
    }
}

fn datagram(messages: &[Message], sequence: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, flags, payload) in messages {
        bytes.extend(((HEADER_BYTES + payload.len()) as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(align(bytes.len()), 0);
    }
    bytes
}

/// An established socket with this local port.
fn socket(port: u16) -> Message {
    let mut payload = vec![0; DIAG_MESSAGE_BYTES];
    payload[..2].copy_from_slice(&[AF_INET, state::ESTABLISHED]);
    payload[4..6].copy_from_slice(&port.to_be_bytes());
    (SOCK_DIAG_BY_FAMILY, 0, payload)
}

fn interrupted((kind, flags, payload): Message) -> Message {
    (kind, flags | NLM_F_DUMP_INTR, payload)
}

fn done() -> Message {
    (NLMSG_DONE, 0, vec![0; 4])
}

fn refused(errno: i32) -> Message {
    (NLMSG_ERROR, 0, (-errno).to_ne_bytes().to_vec())
}

/// How a dump ends that gets these answers, the local ports of its rows, and
/// how often it asked. The script must be read to its end.
fn dump(steps: impl IntoIterator<Item = Step>) -> (Dumped, Vec<u16>, usize) {
    let mut socket = Socket {
        channel: Script {
            steps: RefCell::new(steps.into_iter().collect()),
            sequence: Cell::new(0),
            requests: Cell::new(0),
        },
        sequence: 0,
    };
    let mut ports = Vec::new();
    let dumped = socket.dump(
        States::OPEN,
        false,
        &mut DumpBuffer::default(),
        &mut 0,
        |row| {
            ports.push(row.tuple.local_port);
            true
        },
    );
    let script = socket.channel;
    assert_eq!(script.steps.borrow().len(), 0, "answers left unread");
    (dumped, ports, script.requests.get())
}

fn partial(dumped: Dumped) -> String {
    match dumped {
        Dumped::Partial(why) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_dump_out_of_buffer_space_is_repeated_in_full() {
    let (dumped, ports, requests) = dump([
        Step::Answer(vec![socket(1)]),
        Step::Error(Errno::NOBUFS),
        // The kernel continues the dump, and takes no other request before its
        // end.
        Step::Left(vec![socket(8)]),
        Step::LeftError(Errno::NOBUFS),
        Step::Left(vec![socket(8), done()]),
        // An old answer that was queued is not one to the second request.
        Step::Stale(vec![socket(9), done()]),
        Step::Answer(vec![socket(1), socket(2)]),
        Step::Answer(vec![socket(3), done()]),
    ]);
    assert!(matches!(dumped, Dumped::Complete), "{dumped:?}");
    assert_eq!((ports, requests), (vec![1, 1, 2, 3], 2));
}

#[test]
fn a_dump_that_finds_the_socket_busy_is_retried() {
    let busy = || Step::Answer(vec![refused(libc::EBUSY)]);
    let rest = || Step::Left(vec![socket(8), done()]);
    let (dumped, ports, requests) = dump([
        Step::Error(Errno::NOBUFS),
        busy(),
        // Reading the refusal makes the kernel continue.
        rest(),
        Step::Answer(vec![socket(1), done()]),
    ]);
    assert!(matches!(dumped, Dumped::Complete), "{dumped:?}");
    assert_eq!((ports, requests), (vec![1], 3));

    // Once only.
    let (dumped, _, requests) = dump([busy(), rest(), busy(), rest(), busy(), rest()]);
    assert!(partial(dumped).starts_with("sock_diag: "));
    assert_eq!(requests, 3);
}

#[test]
fn lack_of_memory_is_no_refusal() {
    for errno in [libc::ENOBUFS, libc::ENOMEM] {
        let short = || Step::Answer(vec![refused(errno)]);
        let (dumped, ports, requests) = dump([short(), Step::Answer(vec![socket(1), done()])]);
        assert!(matches!(dumped, Dumped::Complete), "{dumped:?}");
        assert_eq!((ports, requests), (vec![1], 2));

        let (dumped, _, requests) = dump([short(), short()]);
        assert!(partial(dumped).starts_with("sock_diag: "));
        assert_eq!(requests, 2);
    }
}

#[test]
fn a_dump_that_never_ends_is_given_up() {
    let errors = || (0..DRAIN_ERRORS).map(|_| Step::LeftError(Errno::NOBUFS));
    let attempt = || std::iter::once(Step::Error(Errno::NOBUFS)).chain(errors());
    let (dumped, _, requests) = dump(attempt().chain(attempt()));
    assert!(partial(dumped).contains("ran out of buffer space"));
    assert_eq!(requests, 2);
}

#[test]
fn a_dump_interrupted_twice_is_partial() {
    let broken = || Step::Answer(vec![interrupted(socket(1)), socket(2), done()]);
    let (dumped, ports, requests) = dump([broken(), Step::Answer(vec![socket(1), done()])]);
    assert!(matches!(dumped, Dumped::Complete), "{dumped:?}");
    assert_eq!((ports, requests), (vec![1, 2, 1], 2));

    let (dumped, ports, requests) = dump([broken(), broken()]);
    assert!(partial(dumped).contains("interrupted"));
    assert_eq!((ports, requests), (vec![1, 2, 1, 2], 2));
}

#[test]
fn an_answer_that_was_cut_makes_a_dump_partial() {
    // The second message does not fit; DONE would never be seen.
    let fit = HEADER_BYTES + DIAG_MESSAGE_BYTES;
    let cut = || Step::Cut(vec![socket(1), socket(2), done()], fit);
    let (dumped, ports, requests) = dump([cut(), cut()]);
    let whole = 2 * fit + HEADER_BYTES + 4;
    assert_eq!(
        partial(dumped),
        format!("sock_diag: an answer of {whole} bytes was cut at {fit}")
    );
    assert_eq!((ports, requests), (vec![1, 1], 2));
}

#[test]
fn an_error_refuses_a_dump_or_cuts_it_short() {
    let refuse = || Step::Answer(vec![refused(libc::ENOENT)]);
    let (dumped, ports, requests) = dump([refuse()]);
    match dumped {
        Dumped::Refused(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOENT)),
        other => panic!("{other:?}"),
    }
    assert_eq!((ports, requests), (vec![], 1));

    let (dumped, ports, _) = dump([Step::Answer(vec![socket(1)]), refuse(), refuse()]);
    assert!(partial(dumped).starts_with("sock_diag: "));
    assert_eq!(ports, [1]);
}

#[test]
fn bad_messages_and_no_answer_make_a_dump_partial() {
    let short = || Step::Answer(vec![(SOCK_DIAG_BY_FAMILY, 0, vec![1, 2, 3]), done()]);
    let (dumped, _, _) = dump([short(), short()]);
    assert_eq!(partial(dumped), "sock_diag: 1 messages did not parse");

    let no_answer = || Step::Error(Errno::AGAIN);
    let (dumped, _, requests) = dump([no_answer(), no_answer()]);
    partial(dumped);
    assert_eq!(requests, 2);
}

#[test]
fn signals_and_other_processes_do_not_end_a_dump() {
    let (dumped, ports, requests) = dump([
        Step::Forged(vec![socket(9), done()]),
        Step::Error(Errno::INTR),
        Step::Answer(vec![socket(1), done()]),
    ]);
    assert!(matches!(dumped, Dumped::Complete), "{dumped:?}");
    assert_eq!((ports, requests), (vec![1], 1));
}
