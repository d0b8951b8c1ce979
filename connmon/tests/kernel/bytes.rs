//! Bytes, retransmitted segments and round-trip times, compared exactly.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::harness::{Agent, PATIENCE, Scrape};
use crate::network::{PacketFilter, Qdisc, ROUTER};
use crate::raw;
use crate::scenarios::listen;
use crate::traffic::{Family, Pair};
use crate::world::{CLOSED, Counts, Outcome, World, in_guest};

const SENT: &str = "connmon_port_sent_bytes_total";
const RECEIVED: &str = "connmon_port_received_bytes_total";
const RETRANSMITTED: &str = "connmon_port_retransmitted_segments_total";

/// Payload is exact on every way to close, in both directions.
pub fn bytes(world: &mut World<'_>) -> Outcome {
    if !world.traced() {
        let scrape = world.agent.scrape();
        assert!(!scrape.has("connmon_port_sent_bytes_total"));
        return Outcome::Held;
    }
    for family in Family::ALL {
        let listening = listen(world, family);
        let port = listening.port();
        let (mut up, mut down) = (0, 0);
        for round in 0..12 {
            let mut pair = listening.pair();
            let (now_up, now_down) = (1000 + round, 500 * (round % 3));
            pair.exchange(now_up, now_down);
            up += now_up;
            down += now_down;
            pair.close_in_turn(round);
        }
        let scrape = world.settled(port, Counts::both(12), &[]);
        let moved = |family: &str, direction: &str| scrape.port(family, port, direction);
        let (up, down) = (up as f64, down as f64);
        assert_eq!(moved(SENT, "outbound"), up);
        assert_eq!(moved(RECEIVED, "inbound"), up);
        assert_eq!(moved(SENT, "inbound"), down);
        assert_eq!(moved(RECEIVED, "outbound"), down);
    }
    Outcome::Held
}

/// Over a lossy link segments are retransmitted, and payload counts once.
pub fn retransmits(world: &mut World<'_>) -> Outcome {
    const PAYLOAD: usize = 400_000;
    const CHUNK: usize = 1_000;
    if let Err(why) = &world.network.routed {
        return Outcome::NotApplicable(why.clone());
    }
    let lossy = match Qdisc::add(&["loss", "20%"]) {
        Ok(lossy) => lossy,
        Err(why) => return Outcome::NotApplicable(why),
    };
    let listener = world.network.listen_at_router();
    let port = listener.local_addr().unwrap().port();
    world.sees_listener(port);
    let mut client = TcpStream::connect((ROUTER, port)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        server.read_to_end(&mut all).unwrap();
        all.len()
    });
    // Many small segments: a few large ones might all get through.
    client.set_nodelay(true).unwrap();
    for _ in 0..PAYLOAD / CHUNK {
        client.write_all(&[1; CHUNK]).unwrap();
        sleep(Duration::from_micros(200));
    }
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(reader.join().unwrap(), PAYLOAD);
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    // Both ends are through: nothing is sent any more.
    let retransmitted = f64::from(raw::tcp_info(&client).unwrap().total_retrans);
    assert!(
        retransmitted >= 1.0,
        "{retransmitted} segments retransmitted at 20 % loss"
    );
    drop((client, lossy));
    let scrape = world.settled(port, Counts::both(1), &[]);
    if world.traced() {
        let moved = |family: &str, direction: &str| scrape.port(family, port, direction);
        assert_eq!(moved(SENT, "outbound"), PAYLOAD as f64);
        assert_eq!(moved(RECEIVED, "inbound"), PAYLOAD as f64);
        assert_eq!(moved(RETRANSMITTED, "outbound"), retransmitted);
    }
    Outcome::Held
}

/// What our own queueing discipline drops is sent once, however often it is
/// transmitted.
pub fn queue_drops(world: &mut World<'_>) -> Outcome {
    sent_once(world, |_| {
        Qdisc::of("tbf", &["rate", "20mbit", "burst", "10kb", "limit", "20kb"])
    })
}

/// The same of what a filter of ours drops.
pub fn filter_drops(world: &mut World<'_>) -> Outcome {
    sent_once(world, |port| PacketFilter::add(port, 10))
}

/// Sent bytes never fall, never exceed what was written, and come to exactly
/// that, for live connections and at the close, while what we send is dropped
/// on this host.
fn sent_once<T>(world: &mut World<'_>, dropping: impl Fn(u16) -> Result<T, String>) -> Outcome {
    const CONNECTIONS: usize = 4;
    const PAYLOAD: usize = 1_000_000;
    const TOTAL: f64 = (CONNECTIONS * PAYLOAD) as f64;
    if let Err(why) = &world.network.routed {
        return Outcome::NotApplicable(why.clone());
    }
    let listener = world.network.listen_at_router();
    let port = listener.local_addr().unwrap().port();
    let dropping = match dropping(port) {
        Ok(dropping) => dropping,
        Err(why) => return Outcome::NotApplicable(why),
    };
    let mut args = world.rung.args();
    args.extend(["--traffic.interval", "100ms", "--listeners", "off"]);
    let agent = Agent::start(&args);
    let (clients, servers): (Vec<_>, Vec<_>) = (0..CONNECTIONS)
        .map(|_| {
            let client = TcpStream::connect((ROUTER, port)).unwrap();
            (client, listener.accept().unwrap().0)
        })
        .unzip();
    let sent = |scrape: &Scrape| scrape.port(SENT, port, "outbound");
    let received = std::thread::scope(|scope| {
        for client in &clients {
            scope.spawn(move || (&*client).write_all(&[1; PAYLOAD]).unwrap());
        }
        let readers: Vec<_> = servers
            .iter()
            .map(|server| {
                scope.spawn(move || {
                    (&*server)
                        .read_exact(&mut vec![0; PAYLOAD])
                        .map(|()| PAYLOAD)
                })
            })
            .collect();
        let mut last = 0.0;
        while !readers.iter().all(|reader| reader.is_finished()) {
            let now = sent(&agent.scrape());
            assert!(now >= last && now <= TOTAL, "{now} after {last}");
            last = now;
            sleep(Duration::from_millis(20));
        }
        let read = readers.into_iter().map(|reader| reader.join().unwrap());
        read.map(|read| read.unwrap()).sum::<usize>()
    });
    assert_eq!(received as f64, TOTAL);
    let transmitted: u64 = clients
        .iter()
        .map(|client| raw::tcp_info(client).unwrap().first_sent_bytes)
        .sum();
    assert!(transmitted as f64 > TOTAL, "nothing was dropped");
    agent.until("a sample of all that was sent", |scrape| {
        let now = sent(scrape);
        assert!(now <= TOTAL, "{now}");
        now == TOTAL
    });
    for (client, mut server) in clients.into_iter().zip(servers) {
        drop(client);
        assert_eq!(server.read(&mut [0; 1]).unwrap(), 0);
    }
    drop(dropping);
    agent.until("the closes", |scrape| {
        scrape.port(CLOSED, port, "outbound") == CONNECTIONS as f64
    });
    assert_eq!(sent(&agent.scrape()), TOTAL);
    agent.stop();
    let scrape = world.settled(port, Counts::both(CONNECTIONS as u32), &[]);
    // That of the world samples every 15 s: mostly of the closes alone.
    assert_eq!(sent(&scrape), TOTAL);
    assert_eq!(scrape.port(RECEIVED, port, "inbound"), TOTAL);
    world.lives(port, CONNECTIONS);
    Outcome::Held
}

/// (sent outbound, received inbound, sent inbound, received outbound) of a
/// port, and of its country, where nothing else counts.
fn moved(scrape: &Scrape, port: u16) -> [f64; 4] {
    let families = [
        (SENT, "outbound"),
        (RECEIVED, "inbound"),
        (SENT, "inbound"),
        (RECEIVED, "outbound"),
    ];
    families.map(|(family, direction)| scrape.port(family, port, direction))
}

fn moved_of_country(scrape: &Scrape) -> [f64; 4] {
    let families = [
        ("sent", "outbound"),
        ("received", "inbound"),
        ("sent", "inbound"),
        ("received", "outbound"),
    ];
    families.map(|(what, direction)| {
        let family = format!("connmon_country_{what}_bytes_total");
        scrape.sum(&family, &[("country", "private"), ("direction", direction)])
    })
}

/// Connections that live long are sampled: what they moved counts while they
/// are open, what they moved before the agent's start never does, and nothing
/// counts twice at the close.
pub fn bytes_live(world: &mut World<'_>) -> Outcome {
    if let Err(why) = &world.network.routed {
        return Outcome::NotApplicable(why.clone());
    }
    let listener = world.network.listen_at_router();
    let port = listener.local_addr().unwrap().port();
    let pair = || {
        let client = TcpStream::connect((ROUTER, port)).unwrap();
        let (server, _) = listener.accept().unwrap();
        Pair { client, server }
    };
    let mut before = pair();
    before.exchange(70_000, 3_000);
    let mut args = world.rung.args();
    // Samples are spaced by what a walk takes.
    args.extend(["--traffic.interval", "200ms", "--listeners", "off"]);
    let agent = Agent::start(&args);
    let mut check = |what: &str, up: usize, down: usize, open: f64| {
        let wanted = [up, up, down, down].map(|bytes| bytes as f64);
        let started = Instant::now();
        let scrape = loop {
            world.drain();
            let scrape = agent.scrape();
            let now = moved(&scrape, port);
            let over = now.iter().zip(wanted).any(|(now, wanted)| *now > wanted);
            assert!(!over, "{what}: {now:?}, expected {wanted:?}");
            let opens = ["inbound", "outbound"].map(|side| scrape.connections(port, side));
            if opens == [open; 2] && now == wanted {
                break scrape;
            }
            let state = format!("{what}: {now:?} of {wanted:?}, {opens:?} are open");
            let spaced = sample_spacing(&scrape);
            if spaced > MOST_SPACED && opens == [open; 2] && started.elapsed() >= PATIENCE {
                // The closes count all of it once more, without any sample.
                return Some(format!("{state}; a sample is due in up to {spaced:?}"));
            }
            assert!(started.elapsed() < PATIENCE.max(2 * spaced), "{state}");
            sleep(Duration::from_millis(20));
        };
        if in_guest() {
            assert_eq!(moved_of_country(&scrape), wanted, "{what}");
        }
        None
    };
    let mut after = pair();
    assert_eq!(check("from before start", 0, 0, 2.0), None);
    before.exchange(5_000, 700);
    after.exchange(20_000, 10_000);
    let unsampled = check("live", 25_000, 10_700, 2.0);
    before.exchange(30, 40);
    before.close();
    after.exchange(100, 200);
    after.reset();
    assert_eq!(check("closed", 25_130, 10_940, 0.0), None);
    if let Some(why) = unsampled {
        world.inconclusive(&format!("bytes-live: {why}"));
    }
    agent.stop();
    world.lives(port, 2);
    Outcome::Held
}

/// Samples that are further apart than this are not waited for: a guest has
/// 15 minutes for everything.
const MOST_SPACED: Duration = Duration::from_secs(120);

/// How long after a walk the next sample is due: the agent rests for 200 times
/// the CPU time of a walk, and a walk takes no more CPU than time.
fn sample_spacing(scrape: &Scrape) -> Duration {
    Duration::from_secs_f64(200.0 * scrape.sum("connmon_reconcile_duration_seconds", &[]))
}

/// Over a link that delays by 50 ms, the round-trip time of either end is
/// that and a little.
pub fn rtt(world: &mut World<'_>) -> Outcome {
    const DELAY: f64 = 0.05;
    if let Err(why) = &world.network.routed {
        return Outcome::NotApplicable(why.clone());
    }
    let late = match Qdisc::add(&["delay", "50ms"]) {
        Ok(late) => late,
        Err(why) => return Outcome::NotApplicable(why),
    };
    let listener = world.network.listen_at_router();
    let port = listener.local_addr().unwrap().port();
    let client = TcpStream::connect((ROUTER, port)).unwrap();
    let (server, _) = listener.accept().unwrap();
    let mut pair = Pair { client, server };
    pair.exchange(1000, 500);
    let ends =
        [&pair.client, &pair.server].map(|end| f64::from(raw::tcp_info(end).unwrap().rtt_us) / 1e6);
    pair.close();
    drop(late);
    let scrape = world.settled(port, Counts::both(1), &[]);
    let risen = |family: &str, labels: &[(&str, &str)]| {
        scrape.sum(family, labels) - world.base().sum(family, labels)
    };
    let private = [("country", "private")];
    let count = risen("connmon_country_rtt_seconds_count", &private);
    let mean = risen("connmon_country_rtt_seconds_sum", &private) / count;
    assert!(count == 2.0 || !in_guest(), "{count} round-trip times");
    // What a busy machine adds, the kernel's own figure has as well.
    let most = ends
        .into_iter()
        .fold(0.08, |most, rtt| f64::max(most, 1.5 * rtt));
    assert!(
        mean >= DELAY && mean <= most,
        "{mean} s, the kernel says {ends:?}"
    );
    Outcome::Held
}
