//! The agent in polling mode, which needs no privileges: countries of real
//! connections, a database that changes under them, hostile names.
//!
//! Traffic stays on 127.0.0.0/8; a database made for the test places parts
//! of it in countries.

#[path = "support/agent.rs"]
mod agent;
#[path = "support/mod.rs"]
mod support;

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use agent::{Agent, Running, database_of};
use socket2::{Domain, Socket, Type};
use support::{promtool, samples};

const ARGUMENTS: [&str; 3] = [
    "--source=proc",
    "--proc.interval=200ms",
    "--filter.loopback=include",
];

/// A connection from an address of 127.0.0.0/8, both ends held.
struct Connection {
    _client: TcpStream,
    _server: TcpStream,
}

fn connect(listener: &TcpListener, from: &str) -> Connection {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let from: SocketAddr = format!("{from}:0").parse().unwrap();
    socket.bind(&from.into()).unwrap();
    socket
        .connect(&listener.local_addr().unwrap().into())
        .unwrap();
    Connection {
        _client: socket.into(),
        _server: listener.accept().unwrap().0,
    }
}

/// Replaces the file the way a careful writer does.
fn replace(path: &Path, bytes: &[u8]) {
    let new = path.with_extension("new");
    std::fs::write(&new, bytes).unwrap();
    std::fs::rename(new, path).unwrap();
}

fn inbound(text: &str, country: &str) -> Option<f64> {
    value(
        text,
        &format!("connmon_country_connections{{country=\"{country}\",direction=\"inbound\"}}"),
    )
}

fn value(text: &str, series: &str) -> Option<f64> {
    samples(text)
        .into_iter()
        .find(|(name, _)| *name == series)
        .map(|(_, value)| value)
}

fn reloads(text: &str, result: &str) -> Option<f64> {
    value(
        text,
        &format!("connmon_geoip_reloads_total{{result=\"{result}\"}}"),
    )
}

#[test]
fn connections_keep_their_country_over_a_reload() {
    let places = |country| database_of("test", &[("127.7.0.0/16".to_owned(), country)]);
    let scratch = tempfile::tempdir().unwrap();
    let database = scratch.path().join("country.mmdb");
    std::fs::write(&database, places("SE")).unwrap();
    let agent = Agent::start(&database, &ARGUMENTS);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();

    let swedish: Vec<_> = (0..3).map(|_| connect(&listener, "127.7.0.1")).collect();
    agent.eventually("three from Sweden", |text| inbound(text, "SE") == Some(3.0));

    replace(&database, &places("JP"));
    agent.eventually("a reload", |text| reloads(text, "success") == Some(1.0));
    let japanese: Vec<_> = (0..2).map(|_| connect(&listener, "127.7.0.1")).collect();
    agent.eventually("three from Sweden, two from Japan", |text| {
        inbound(text, "SE") == Some(3.0) && inbound(text, "JP") == Some(2.0)
    });

    // A bad file is refused and changes nothing.
    replace(&database, b"no database at all");
    let text = agent.eventually("a refusal", |text| reloads(text, "failure") == Some(1.0));
    assert_eq!(reloads(&text, "success"), Some(1.0));
    let another = connect(&listener, "127.7.0.1");
    agent.eventually("three from Japan", |text| inbound(text, "JP") == Some(3.0));

    // SIGHUP reads the file although it did not change.
    agent.signal("HUP");
    agent.eventually("another refusal", |text| {
        reloads(text, "failure") == Some(2.0)
    });

    drop((swedish, japanese, another));
    let text = agent.eventually("all closed", |text| {
        inbound(text, "SE") == Some(0.0) && inbound(text, "JP") == Some(0.0)
    });
    promtool("scrape after reloads", &text);
}

/// Read into memory and checked, not mapped: a file that shrinks under the
/// agent takes nothing away from it, not even for an address never asked for.
#[test]
fn a_database_truncated_in_place_still_answers() {
    let networks = [
        ("127.17.0.0/16".to_owned(), "SE"),
        ("127.16.0.0/16".to_owned(), "DK"),
    ];
    let scratch = tempfile::tempdir().unwrap();
    let database = scratch.path().join("country.mmdb");
    std::fs::write(&database, database_of("test", &networks)).unwrap();
    let agent = Agent::start(&database, &ARGUMENTS);
    let file = std::fs::File::options()
        .write(true)
        .open(&database)
        .unwrap();
    file.set_len(0).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _held = [
        connect(&listener, "127.17.0.1"),
        connect(&listener, "127.16.0.1"),
    ];
    agent.eventually("both located", |text| {
        inbound(text, "SE") == Some(1.0) && inbound(text, "DK") == Some(1.0)
    });
    let text = agent.eventually("a refusal", |text| reloads(text, "failure") == Some(1.0));
    assert_eq!(inbound(&text, "SE"), Some(1.0));
    agent.logs("the one loaded before stays in use");
}

/// A web configuration that breaks while running: the old one stays, with one
/// line in the log.
#[test]
fn a_broken_web_configuration_is_complained_about() {
    let scratch = tempfile::tempdir().unwrap();
    let database = scratch.path().join("country.mmdb");
    std::fs::write(
        &database,
        database_of("test", &[("127.7.0.0/16".to_owned(), "SE")]),
    )
    .unwrap();
    let web = scratch.path().join("web.yml");
    let good = "http_server_config:\n  headers:\n    X-Frame-Options: sameorigin\n";
    std::fs::write(&web, good).unwrap();
    let flag = format!("--web.config.file={}", web.display());
    let agent = Agent::start(&database, &[&ARGUMENTS[..], &[&flag]].concat());
    replace(&web, b"http_server_config:\n  banana: 1\n");
    agent.logs("web.yml:2: http_server_config.banana: unknown key");
    agent.logs("keeping the old web configuration");
    agent.scrape();
    agent.scrape();
    assert_eq!(
        agent.log().matches("keeping the old").count(),
        1,
        "{}",
        agent.log()
    );
}

/// A process called `\xff\n"` listens, and the database calls itself worse.
#[test]
fn hostile_names_leave_scrape_summary_and_page_valid() {
    const SCRIPT: &str = r#"$0 = "\xff\n\""; use IO::Socket::INET; $| = 1;
        my $s = IO::Socket::INET->new(Listen => 5, LocalAddr => "127.0.0.1") or die;
        print $s->sockport, "\n"; sleep 600;"#;
    let child = Command::new("perl")
        .args(["-e", SCRIPT])
        .stdout(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return support::skipped("hostile process name", &format!("perl: {error}")),
    };
    let mut port = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut port)
        .unwrap();
    let _child = Running::new(child);
    let port: u16 = port.trim().parse().unwrap();

    let scratch = tempfile::tempdir().unwrap();
    let database = scratch.path().join("country.mmdb");
    let networks = [
        ("127.8.0.0/16".to_owned(), "<script>"),
        ("127.9.0.0/16".to_owned(), "DE"),
    ];
    let hostile = database_of("\"</script><script>alert(1)</script>\\\n", &networks);
    std::fs::write(&database, hostile).unwrap();
    let agent = Agent::start(&database, &ARGUMENTS);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _held = [
        connect(&listener, "127.8.0.1"),
        connect(&listener, "127.9.0.1"),
    ];

    // What is no UTF-8 or would break a line is replaced, the quote escaped.
    let entry = format!("port=\"{port}\",process=\"\u{fffd}\u{fffd}\\\"\",pid=");
    let text = agent.eventually("the hostile listener", |text| {
        text.contains(&entry) && inbound(text, "DE") == Some(1.0)
    });
    assert!(!text.contains("country=\"<"), "{text}");
    assert!(text.contains(r#"database_type="\"</script><script>alert(1)</script>\\"#));
    promtool("scrape with hostile names", &text);

    let summary: serde_json::Value = serde_json::from_str(&agent.get("/api/v1/summary")).unwrap();
    assert!(summary["countries"].as_array().unwrap().iter().all(|row| {
        let country = row["country"].as_str().unwrap();
        country.bytes().all(|byte| byte.is_ascii_alphabetic())
    }));
    // The page is a fixed file: nothing of this can be in it.
    assert!(!agent.get("/").contains("alert(1)"));
}

/// SIGTERM and SIGINT end it cleanly, and soon.
#[test]
fn signals_end_it_cleanly() {
    for signal in ["TERM", "INT"] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_connmon"))
            .args(ARGUMENTS)
            .args(["--web.listen-address=127.0.0.1:0", "--log.level=info"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let printed = lines.any(|line| line.unwrap().contains("shows the map"));
        assert!(printed, "it never became ready");
        let start = std::time::Instant::now();
        let pid = child.id().to_string();
        assert!(
            Command::new("kill")
                .args([&format!("-{signal}"), &pid])
                .status()
                .unwrap()
                .success()
        );
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(0), "SIG{signal}");
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "SIG{signal}: {:?}",
            start.elapsed()
        );
    }
}
