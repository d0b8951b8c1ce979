use super::*;

const TUPLE: Tuple = Tuple {
    local: std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)),
    local_port: 4000,
    remote: std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2)),
    remote_port: 80,
};
const SOCKET: Socket = Socket {
    id: 0xffff_8000_0000_1000,
    cookie: 1,
    netns: 7,
};

fn owner(pid: u32) -> Owner {
    Owner {
        pid,
        comm: *b"curl\0\0\0\0\0\0\0\0\0\0\0\0",
        cgroup: 0,
    }
}

fn connect(at_ns: u64) -> Event {
    Event::Connect {
        socket: SOCKET,
        at_ns,
        tuple: Tuple {
            local_port: 0,
            ..TUPLE
        },
        owner: owner(5),
    }
}

fn open(at_ns: u64, old: u8) -> Event {
    Event::Open {
        socket: SOCKET,
        at_ns,
        tuple: TUPLE,
        old,
        new: state::ESTABLISHED,
    }
}

fn closed(at_ns: u64, old: u8, error: u32) -> Event {
    Event::Close {
        socket: SOCKET,
        at_ns,
        tuple: Tuple {
            local_port: 0,
            ..TUPLE
        },
        old,
        error,
        segments_out: Some(1),
        shut_down: false,
        traffic: Some(Traffic::default()),
    }
}

/// The close of another socket than [`SOCKET`], or with other endpoints.
fn closed_as(socket: Socket, tuple: Tuple, old: u8) -> Event {
    Event::Close {
        socket,
        at_ns: 2000,
        tuple,
        old,
        error: 0,
        segments_out: Some(1),
        shut_down: false,
        traffic: None,
    }
}

/// A connection from before, with the owner 3.
fn seed(netns: NetnsId, tuple: Tuple, direction: Direction) -> Connection {
    Connection {
        cookie: 0,
        netns,
        tuple,
        direction,
        owner: owner(3),
    }
}

#[test]
fn an_outbound_connection_keeps_owner_port_and_times() {
    let mut follower = Follower::default();
    assert_eq!(follower.apply(&connect(100)), None);
    let opened = follower.apply(&open(350, state::SYN_SENT)).unwrap();
    assert_eq!(opened.duration_ns, Some(250));
    assert_eq!(opened.connection.owner.pid, 5);
    let closed = follower.apply(&closed(1350, state::FIN_WAIT2, 0)).unwrap();
    assert_eq!(closed.happening, Happening::Close);
    assert_eq!(closed.duration_ns, Some(1000));
    assert_eq!(closed.connection.tuple, TUPLE);
    assert!(follower.by_id.is_empty());
}

#[test]
fn a_failed_connect_has_a_reason_and_no_traffic() {
    let mut follower = Follower::default();
    follower.apply(&connect(0));
    let failed = follower.apply(&closed(10, state::SYN_SENT, 111)).unwrap();
    assert_eq!(failed.happening, Happening::Fail(FailureReason::Refused));
    assert_eq!(failed.traffic, None);
}

#[test]
fn an_unwritten_fast_open_connect_is_no_event() {
    for shut_down in [true, false] {
        let mut follower = Follower::default();
        follower.apply(&connect(0));
        let ended = follower.apply(&Event::Close {
            socket: SOCKET,
            at_ns: 10,
            tuple: TUPLE,
            old: state::SYN_SENT,
            error: 0,
            segments_out: Some(0),
            shut_down,
            traffic: None,
        });
        let expected = (!shut_down).then_some(Happening::Fail(FailureReason::Local));
        assert_eq!(ended.map(|ended| ended.happening), expected);
        assert!(follower.by_id.is_empty());
    }
}

#[test]
fn an_accept_moves_the_owner_from_the_listener() {
    let mut follower = Follower::default();
    follower.listeners(&[listening(ANY, 1)]);
    let opened = follower.apply(&open(0, state::SYN_RECV)).unwrap();
    assert_eq!(
        (opened.connection.direction, opened.connection.owner.pid),
        (Direction::Inbound, 1)
    );
    follower.apply(&Event::Accept {
        id: SOCKET.id,
        at_ns: 1,
        owner: owner(2),
    });
    let closed = follower.apply(&closed(9, state::LAST_ACK, 0)).unwrap();
    assert_eq!(closed.connection.owner.pid, 2);
}

/// A listener of namespace 7 on the port of [`TUPLE`].
fn listening(address: IpAddr, pid: u32) -> Listening {
    Listening {
        netns: 7,
        address,
        port: TUPLE.local_port,
        owner: owner(pid),
    }
}

const ANY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const ANY_V6: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

#[test]
fn a_listener_is_found_by_its_address() {
    let another = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 9));
    for (listeners, expected) in [
        (&[(TUPLE.local, 1), (another, 2)][..], 1),
        (&[(another, 2), (TUPLE.local, 1)], 1),
        (&[(another, 2)], 0),
        (&[(ANY, 3), (another, 2)], 3),
        (&[(TUPLE.local, 1), (ANY, 3)], 1),
        (&[(ANY_V6, 4)], 4),
        (&[(ANY_V6, 4), (ANY, 3)], 3),
    ] {
        let mut follower = Follower::default();
        let all: Vec<Listening> = (listeners.iter())
            .map(|&(address, pid)| listening(address, pid))
            .collect();
        follower.listeners(&all);
        let opened = follower.apply(&open(0, state::SYN_RECV)).unwrap();
        assert_eq!(opened.connection.owner.pid, expected, "{listeners:?}");
    }
}

#[test]
fn a_listener_that_ended_names_nobody() {
    let mut follower = Follower::default();
    let (address, port) = (TUPLE.local, TUPLE.local_port);
    let socket = SOCKET;
    follower.listeners(&[listening(ANY, 3)]);
    for pid in [1, 2] {
        follower.apply(&Event::Listen {
            socket,
            address,
            port,
            owner: owner(pid),
        });
    }
    // Of two that share the endpoint one is left.
    for expected in [2, 3] {
        follower.apply(&Event::Unlisten {
            socket,
            address,
            port,
        });
        let opened = follower.apply(&open(0, state::SYN_RECV)).unwrap();
        assert_eq!(opened.connection.owner.pid, expected);
    }
}

#[test]
fn a_passive_open_that_never_completed_is_nothing() {
    let mut follower = Follower::default();
    assert_eq!(follower.apply(&closed(0, state::SYN_RECV, 0)), None);
}

#[test]
fn a_close_never_takes_an_earlier_sockets_owner() {
    let elsewhere = Tuple {
        remote_port: 81,
        ..TUPLE
    };
    let later = Socket {
        cookie: 2,
        ..SOCKET
    };
    for (socket, tuple, old, reported) in [
        (
            SOCKET,
            elsewhere,
            state::FIN_WAIT2,
            Some(Direction::Unknown),
        ),
        (later, TUPLE, state::FIN_WAIT2, Some(Direction::Unknown)),
        (SOCKET, TUPLE, state::SYN_SENT, Some(Direction::Outbound)),
        (SOCKET, TUPLE, state::SYN_RECV, None),
    ] {
        let mut follower = Follower::default();
        follower.apply(&connect(100));
        follower.apply(&open(350, state::SYN_SENT));
        let ended = follower.apply(&closed_as(socket, tuple, old));
        let found = ended.map(|ended| {
            assert_eq!((ended.connection.tuple, ended.duration_ns), (tuple, None));
            (ended.connection.direction, ended.connection.owner.pid)
        });
        let expected = reported.map(|direction| (direction, 0));
        assert_eq!(found, expected, "{socket:?} {tuple:?} {old}");
        assert!(follower.by_id.is_empty());
    }
}

#[test]
fn a_seed_closes_at_a_reused_socket_address() {
    let seeded = Tuple {
        local_port: 22,
        remote_port: 50_000,
        ..TUPLE
    };
    let mut follower = Follower::default();
    follower.seed(seed(7, seeded, Direction::Inbound));
    follower.apply(&connect(100));
    follower.apply(&open(350, state::SYN_SENT));
    let socket = Socket {
        cookie: 2,
        ..SOCKET
    };
    let ended = follower
        .apply(&closed_as(socket, seeded, state::LAST_ACK))
        .unwrap();
    assert_eq!(
        (ended.connection.direction, ended.connection.owner.pid),
        (Direction::Inbound, 3)
    );
}

#[test]
fn an_open_ignores_an_earlier_sockets_connect() {
    let mut follower = Follower::default();
    follower.apply(&connect(100));
    let opened = follower
        .apply(&Event::Open {
            socket: Socket {
                cookie: 2,
                ..SOCKET
            },
            at_ns: 350,
            tuple: TUPLE,
            old: state::SYN_RECV,
            new: state::ESTABLISHED,
        })
        .unwrap();
    assert_eq!(
        (
            opened.connection.direction,
            opened.connection.owner.pid,
            opened.duration_ns
        ),
        (Direction::Inbound, 0, None)
    );
}

/// The tracepoint's program without BTF.
#[test]
fn events_without_a_namespace_match_by_endpoints() {
    let socket = Socket {
        cookie: 0,
        netns: 0,
        ..SOCKET
    };
    let mut follower = Follower::default();
    follower.seed(seed(7, TUPLE, Direction::Inbound));
    follower.listeners(&[listening(ANY, 1)]);
    let ended = follower
        .apply(&closed_as(socket, TUPLE, state::LAST_ACK))
        .unwrap();
    assert_eq!(
        (ended.connection.direction, ended.connection.owner.pid),
        (Direction::Inbound, 3)
    );
    let opened = follower
        .apply(&Event::Open {
            socket,
            at_ns: 3000,
            tuple: TUPLE,
            old: state::SYN_RECV,
            new: state::ESTABLISHED,
        })
        .unwrap();
    assert_eq!(opened.connection.owner.pid, 1);
}

#[test]
fn equal_endpoints_in_two_namespaces_stay_apart() {
    let mut follower = Follower::default();
    for _ in 0..2 {
        follower.seed(seed(7, TUPLE, Direction::Inbound));
        follower.seed(seed(8, TUPLE, Direction::Outbound));
    }
    assert_eq!(follower.seeds[&TUPLE].len(), 2);
    for (netns, direction) in [
        (9, Direction::Unknown),
        (8, Direction::Outbound),
        (7, Direction::Inbound),
    ] {
        let socket = Socket { netns, ..SOCKET };
        let ended = follower
            .apply(&closed_as(socket, TUPLE, state::LAST_ACK))
            .unwrap();
        assert_eq!(ended.connection.direction, direction, "{netns}");
    }
    assert!(follower.seeds.is_empty());
}
