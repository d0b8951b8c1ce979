//! The HTTP server on real sockets: routes, formats, and clients that are
//! too many, too slow or wrong.

mod web_support;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use connmon_core::report::Unavailable;
use connmon_http::Limits;
use web_support::{FakeState, Start, parse};

/// Times short enough to wait for.
fn short() -> Limits {
    Limits {
        header: Duration::from_millis(600),
        idle: Duration::from_millis(1500),
        write: Duration::from_millis(1200),
        handshake: Duration::from_millis(600),
        tick: Duration::from_millis(50),
        ..Limits::default()
    }
}

/// Until the server hangs up, or `None` if it does not within `patience`.
fn hangs_up(stream: &mut TcpStream, patience: Duration) -> Option<Duration> {
    let began = Instant::now();
    stream.set_read_timeout(Some(patience)).unwrap();
    let mut byte = [0; 4096];
    loop {
        match stream.read(&mut byte) {
            Ok(0) => return Some(began.elapsed()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                return Some(began.elapsed());
            }
            Err(_) => return None,
        }
    }
}

#[test]
fn the_limits_are_the_documented_ones() {
    let limits = Limits::default();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/web.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (bytes, fields) = (limits.header_bytes, limits.header_fields);
    for (what, bound) in [
        (
            "connections",
            format!("{}, at least `--web.max-requests` + 24", limits.connections),
        ),
        (
            "request line and header",
            format!("{bytes} bytes; over HTTP/1, {fields} fields"),
        ),
        ("TLS handshake", format!("{} s", limits.handshake.as_secs())),
        (
            "request header, from its first byte",
            format!("{} s", limits.header.as_secs()),
        ),
        (
            "idle between requests",
            format!("{} s", limits.idle.as_secs()),
        ),
        (
            "response, each on its own, until its last byte is sent",
            format!("{} s", limits.write.as_secs()),
        ),
        ("report", format!("{} s", limits.report.as_secs())),
    ] {
        let row = format!("| {what} | {bound} |");
        assert!(text.contains(&row), "docs/web.md lacks {row}");
    }
    assert_eq!(limits.connections, 64);
    assert_eq!(limits.slow_reader, Duration::from_secs(2));
    assert_eq!(limits.tick, Duration::from_secs(1));
    assert_eq!(limits.drain, Duration::from_millis(500));
}

fn has_security_headers(reply: &web_support::Reply, what: &str) {
    for (name, value) in [
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("x-frame-options", "deny"),
    ] {
        assert_eq!(reply.header(name), Some(value), "{what}");
    }
    let policy = reply.header("content-security-policy").expect(what);
    for part in [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "frame-ancestors 'none'",
    ] {
        assert!(policy.contains(part), "{what}: {policy}");
    }
}

#[test]
fn every_route_answers() {
    let server = Start::default().run();
    for (path, status, content_type, text) in [
        (
            "/metrics",
            200,
            "text/plain; version=0.0.4; charset=utf-8",
            "report ",
        ),
        (
            "/metrics?name[]=x",
            200,
            "text/plain; version=0.0.4; charset=utf-8",
            "report ",
        ),
        (
            "/-/healthy",
            200,
            "text/plain; charset=utf-8",
            "connmon is healthy\n",
        ),
        (
            "/-/ready",
            200,
            "text/plain; charset=utf-8",
            "connmon is ready\n",
        ),
        (
            "/api/v1/summary",
            200,
            "application/json; charset=utf-8",
            "{\"report\":",
        ),
        ("/", 200, "text/html; charset=utf-8", "<!doctype html>"),
        ("/page.js", 200, "text/javascript; charset=utf-8", "1\n"),
        (
            "/metricsx",
            404,
            "text/plain; charset=utf-8",
            "no such page\n",
        ),
        (
            "//metrics",
            404,
            "text/plain; charset=utf-8",
            "no such page\n",
        ),
        (
            "/../etc/passwd",
            404,
            "text/plain; charset=utf-8",
            "no such page\n",
        ),
    ] {
        let reply = server.get(path, "");
        assert_eq!(reply.status, status, "{path}");
        assert_eq!(reply.header("content-type"), Some(content_type), "{path}");
        assert!(reply.text().contains(text), "{path}: {}", reply.text());
        let length = reply.header("content-length").unwrap();
        assert_eq!(length, reply.body.len().to_string(), "{path}");
        has_security_headers(&reply, path);
        let cache = reply.header("cache-control").unwrap();
        let asset = status == 200 && matches!(path, "/" | "/page.js");
        assert_eq!(cache, if asset { "no-cache" } else { "no-store" }, "{path}");
    }
}

#[test]
fn head_is_get_without_the_body() {
    let server = Start::default().run();
    for path in [
        "/metrics",
        "/",
        "/-/healthy",
        "/-/ready",
        "/api/v1/summary",
        "/nothing",
    ] {
        for headers in ["", "Accept-Encoding: gzip\r\n"] {
            let get = server.get(path, headers);
            let head = server.request("HEAD", path, headers);
            assert_eq!(head.status, get.status, "{path}");
            assert!(head.body.is_empty(), "{path}");
            let without_date = |reply: &web_support::Reply| {
                let mut headers = reply.headers.clone();
                headers.retain(|(name, _)| name != "date");
                headers.sort();
                headers
            };
            if path == "/metrics" && !headers.is_empty() {
                // Compressed length may vary with the report's number.
                assert_eq!(head.header("content-encoding"), Some("gzip"));
                assert!(head.header("content-length").unwrap() != "0");
            } else {
                assert_eq!(
                    without_date(&head),
                    without_date(&get),
                    "{path} {headers:?}"
                );
            }
        }
    }
}

/// As `nc -N` does.
#[test]
fn who_has_said_everything_is_still_answered() {
    let server = Start::default().run();
    for version in ["1.0", "1.1"] {
        let mut stream = server.connect();
        write!(stream, "GET /metrics HTTP/{version}\r\nHost: x\r\n\r\n").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        assert_eq!(parse(&bytes).status, 200, "{version}");
    }
}

#[test]
fn only_get_and_head_and_no_bodies() {
    let server = Start::default().run();
    for method in [
        "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW", "get",
    ] {
        let reply = server.request(method, "/metrics", "");
        assert_eq!(reply.status, 405, "{method}");
        assert_eq!(reply.header("allow"), Some("GET, HEAD"), "{method}");
    }
    let reply = server.raw(
        "POST /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc",
    );
    assert_eq!(reply.status, 405);
    let reply = server.raw("GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc");
    assert_eq!(reply.status, 413);
    let reply = server.raw(
        "GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    );
    assert_eq!(reply.status, 413);
    // A body of no bytes is none.
    let reply = server.request("GET", "/metrics", "Content-Length: 0\r\n");
    assert_eq!(reply.status, 200);
    let tunnel = "CONNECT x:1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    assert_eq!(server.raw(tunnel).status, 405);
    assert_eq!(server.raw("\0\u{1}nonsense\r\n\r\n").status, 400);
    assert_eq!(server.get("/-/healthy", "").status, 200);
}

/// RFC 9112, 3.2.
#[test]
fn http_1_1_needs_exactly_one_host() {
    let server = Start::default().run();
    for path in ["/metrics", "/-/healthy", "/", "/nothing"] {
        for (version, hosts, valid) in [
            ("1.1", "Host: x\r\n", true),
            ("1.1", "Host: [::1]:19910\r\n", true),
            ("1.1", "Host:\r\n", true),
            ("1.0", "", true),
            ("1.1", "", false),
            ("1.1", "Host: x\r\nHost: x\r\n", false),
            ("1.1", "Host: x\r\nhost: y\r\n", false),
            ("1.0", "Host: x\r\nHost: y\r\n", false),
            ("1.1", "Host: x y\r\n", false),
            ("1.1", "Host: user@x\r\n", false),
            ("1.1", "Host: x:http\r\n", false),
        ] {
            let what = format!("{path} HTTP/{version} {hosts:?}");
            let request = format!("GET {path} HTTP/{version}\r\n{hosts}Connection: close\r\n\r\n");
            let reply = server.raw(&request);
            assert_eq!(reply.status != 400, valid, "{what}: {}", reply.status);
            has_security_headers(&reply, &what);
        }
    }
    // The host of the request line does not count.
    let reply = server.raw("GET http://x/metrics HTTP/1.1\r\n\r\n");
    assert_eq!(reply.status, 400);
}

/// Scrapers reach it under any name, and so may a site by DNS rebinding; its
/// visitors' browsers have no password for its name.
#[test]
fn any_host_is_answered_unless_users_are_set() {
    let rebound = |server: &web_support::Running, path: &str| {
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: site.example\r\nConnection: close\r\n\r\n");
        server.raw(&request).status
    };
    let paths = ["/metrics", "/api/v1/summary", "/"];
    let server = Start::default().run();
    assert!(paths.iter().all(|path| rebound(&server, path) == 200));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("web.yml");
    let hash = bcrypt::hash("password", 4).unwrap();
    std::fs::write(&file, format!("basic_auth_users:\n  user: {hash}\n")).unwrap();
    let server = Start {
        web_config: Some(file),
        ..Start::default()
    }
    .run();
    assert!(paths.iter().all(|path| rebound(&server, path) == 401));
}

/// hyper has answers of its own, which never reach the handler.
#[test]
fn what_cannot_be_parsed_is_refused_with_all_headers() {
    let server = Start::default().run();
    let long = "a".repeat(20_000);
    let many: String = (0..100).map(|n| format!("X-{n}: 1\r\n")).collect();
    for (what, request, status) in [
        ("noise", "\0\u{1}nonsense\r\n\r\n".to_owned(), 400),
        (
            "a bad version",
            "GET / HTTP/9.9\r\nHost: x\r\n\r\n".to_owned(),
            400,
        ),
        (
            "a bad target",
            "GET http:/// HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
            400,
        ),
        (
            "a bad name",
            "GET / HTTP/1.1\r\nHost: x\r\nX Y: 1\r\n\r\n".to_owned(),
            400,
        ),
        (
            "a bad length",
            "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n".to_owned(),
            400,
        ),
        (
            "a long path",
            format!("GET /{long} HTTP/1.1\r\nHost: x\r\n\r\n"),
            431,
        ),
        (
            "a long header",
            format!("GET / HTTP/1.1\r\nHost: x\r\nX: {long}\r\n\r\n"),
            431,
        ),
        (
            "many headers",
            format!("GET / HTTP/1.1\r\nHost: x\r\n{many}\r\n"),
            431,
        ),
    ] {
        let reply = server.raw(&request);
        assert_eq!(reply.status, status, "{what}");
        has_security_headers(&reply, what);
        assert_eq!(reply.header("connection"), Some("close"), "{what}");
        assert!(reply.header("date").is_some(), "{what}");
        let length = reply.header("content-length").unwrap();
        assert_eq!(length, reply.body.len().to_string(), "{what}");
        assert!(reply.text().starts_with("the request"), "{what}");
    }
    // Behind a good request on the same connection, too.
    let mut stream = server.connect();
    stream
        .write_all(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\nnonsense\r\n\r\n")
        .unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(parse(&bytes).status, 200);
    let second = bytes.windows(9).rposition(|window| window == b"HTTP/1.1 ");
    let second = parse(&bytes[second.unwrap()..]);
    assert_eq!(second.status, 400);
    has_security_headers(&second, "the second of two");
}

/// The answer to the second request is not mixed into that to the first.
#[test]
fn nonsense_behind_a_request_keeps_its_answer() {
    let server = Start {
        padding: 24 << 20,
        ..Start::default()
    }
    .run();
    let mut stream = server.connect();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\nnonsense\r\n\r\n")
        .unwrap();
    // The answer is larger than what fits the socket.
    std::thread::sleep(Duration::from_millis(500));
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let first = parse(&bytes);
    assert_eq!(first.status, 200);
    let length: usize = first.header("content-length").unwrap().parse().unwrap();
    let (first, second) = first.body.split_at(length);
    assert!(first.ends_with(b"report 1\n"));
    let second = parse(second);
    assert_eq!(second.status, 400);
    has_security_headers(&second, "the second of two");
}

#[test]
fn the_text_format_is_the_same_for_every_prometheus() {
    let server = Start::default().run();
    for accept in [
        // Prometheus 2.42 scrape/scrape.go, scrapeAcceptHeader.
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        // Prometheus 3: escaping schemes, PrometheusText1.0.0 first.
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
        // Prometheus with native histograms.
        "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.7,application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.1",
        "application/openmetrics-text",
        "application/json",
        "*/*",
        "",
    ] {
        let reply = server.get(
            "/metrics",
            &format!("Accept: {accept}\r\nAccept-Encoding: gzip\r\nX-Prometheus-Scrape-Timeout-Seconds: 10\r\n"),
        );
        assert_eq!(reply.status, 200, "{accept}");
        let content_type = reply.header("content-type").unwrap();
        assert_eq!(content_type, "text/plain; version=0.0.4; charset=utf-8");
        assert_eq!(reply.header("content-encoding"), Some("gzip"));
        assert_eq!(reply.header("vary"), Some("accept-encoding"));
        assert!(reply.gunzipped().contains("report "), "{accept}");
    }
    let plain = server.get("/metrics", "Accept-Encoding: gzip;q=0, identity\r\n");
    assert_eq!(plain.header("content-encoding"), None);
    assert_eq!(plain.header("vary"), Some("accept-encoding"));
    assert!(plain.text().contains("report "));
    let page = server.get("/", "Accept-Encoding: br, gzip\r\n");
    assert!(page.gunzipped().starts_with("<!doctype html>"));
    let http10 = server.raw("GET /metrics HTTP/1.0\r\n\r\n");
    assert_eq!(http10.status, 200);
    assert!(http10.text().contains("report "));
}

#[test]
fn not_ready_says_what_it_waits_for() {
    let server = Start {
        state: FakeState::WaitingFor("the walk of 3 namespaces"),
        ..Start::default()
    }
    .run();
    for path in ["/metrics", "/-/ready", "/api/v1/summary"] {
        let reply = server.get(path, "");
        assert_eq!(reply.status, 503, "{path}");
        assert!(
            reply.text().contains("the walk of 3 namespaces"),
            "{path}: {}",
            reply.text()
        );
        assert_eq!(reply.header("retry-after"), Some("1"), "{path}");
    }
    assert_eq!(server.get("/-/healthy", "").status, 200);
    assert_eq!(server.get("/", "").status, 200);
    *server.reporter.state.lock().unwrap() = FakeState::Ready;
    assert_eq!(server.get("/-/ready", "").status, 200);
    assert_eq!(server.get("/metrics", "").status, 200);
}

#[test]
fn a_fold_that_does_not_answer_is_503() {
    let mut limits = short();
    limits.report = Duration::from_millis(300);
    let server = Start {
        state: FakeState::Unavailable(Unavailable::Timeout),
        limits,
        ..Start::default()
    }
    .run();
    for state in [
        FakeState::Unavailable(Unavailable::Timeout),
        FakeState::Unavailable(Unavailable::Gone),
        FakeState::Never,
    ] {
        *server.reporter.state.lock().unwrap() = state.clone();
        for path in ["/metrics", "/-/ready", "/api/v1/summary"] {
            let reply = server.get(path, "");
            assert_eq!(reply.status, 503, "{state:?} {path}");
            assert!(
                reply.text().contains("fold"),
                "{state:?} {path}: {}",
                reply.text()
            );
        }
        assert_eq!(server.get("/-/healthy", "").status, 200);
    }
}

#[test]
fn waiting_scrapes_share_the_next_report() {
    let server = Start {
        delay: Duration::from_millis(1500),
        ..Start::default()
    }
    .run();
    let first = std::thread::scope(|scope| {
        let first = scope.spawn(|| server.get("/metrics", ""));
        std::thread::sleep(Duration::from_millis(300));
        // The first report is under way, and older than these ten.
        let rest: Vec<_> = (0..10)
            .map(|number| {
                let coding = if number % 2 == 0 {
                    "Accept-Encoding: gzip\r\n"
                } else {
                    ""
                };
                let server = &server;
                scope.spawn(move || server.get("/metrics", coding))
            })
            .collect();
        for thread in rest {
            let reply = thread.join().unwrap();
            let text = match reply.header("content-encoding") {
                Some(_) => reply.gunzipped(),
                None => reply.text().to_owned(),
            };
            assert!(text.ends_with("report 2\n"));
        }
        first.join().unwrap()
    });
    assert!(first.text().ends_with("report 1\n"));
    assert_eq!(server.reporter.reports.load(Ordering::SeqCst), 2);
    assert_eq!(server.renders.load(Ordering::SeqCst), 2);
}

#[test]
fn scrapes_beyond_max_requests_get_503() {
    let server = Start {
        max_requests: 2,
        delay: Duration::from_millis(700),
        ..Start::default()
    }
    .run();
    std::thread::scope(|scope| {
        let served: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| server.get("/metrics", "").status))
            .collect();
        std::thread::sleep(Duration::from_millis(200));
        let reply = server.get("/metrics", "");
        assert_eq!(reply.status, 503);
        assert!(
            reply
                .text()
                .contains("limit of concurrent requests reached"),
            "{}",
            reply.text()
        );
        assert_eq!(server.get("/api/v1/summary", "").status, 503);
        assert_eq!(server.get("/-/healthy", "").status, 200);
        assert_eq!(server.get("/-/ready", "").status, 200);
        for thread in served {
            assert_eq!(thread.join().unwrap(), 200);
        }
    });
    assert_eq!(server.get("/metrics", "").status, 200);
}

#[test]
fn keep_alive_and_pipelining_answer_in_order() {
    let server = Start::default().run();
    let mut stream = server.connect();
    stream
        .write_all(
            b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n\
              HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n\
              GET /-/ready HTTP/1.1\r\nHost: x\r\n\r\n\
              GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        )
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let places: Vec<_> = [
        "connmon is healthy",
        "version=0.0.4",
        "connmon is ready",
        "no such page",
    ]
    .iter()
    .map(|part| text.find(part).unwrap_or_else(|| panic!("{part}: {text}")))
    .collect();
    assert!(places.is_sorted(), "{text}");
    assert_eq!(text.matches("HTTP/1.1 ").count(), 4);
}

#[test]
fn oversized_headers_are_refused() {
    let server = Start::default().run();
    let long = format!("X-Long: {}\r\n", "a".repeat(20_000));
    assert_eq!(server.get("/metrics", &long).status, 431);
    let many: String = (0..200).map(|n| format!("X-{n}: 1\r\n")).collect();
    assert_eq!(server.get("/metrics", &many).status, 431);
    let path = format!("/{}", "a".repeat(70_000));
    let status = server.get(&path, "").status;
    assert!(matches!(status, 414 | 431), "{status}");
    let endless = server.connect();
    let mut writer = endless.try_clone().unwrap();
    writer.write_all(b"GET / HTTP/1.1\r\nX: ").unwrap();
    // The server gives up long before this is all taken.
    let pumped = (0..1000).try_for_each(|_| writer.write_all(&[b'a'; 64 * 1024]));
    assert!(pumped.is_err());
    // What fits is fine.
    let fits = format!("X-Long: {}\r\n", "a".repeat(12_000));
    assert_eq!(server.get("/metrics", &fits).status, 200);
}

#[test]
fn silent_and_dribbling_clients_are_cut() {
    let server = Start {
        limits: short(),
        ..Start::default()
    }
    .run();
    let (least, most) = (Duration::from_millis(400), Duration::from_secs(5));
    let mut silent = server.connect();
    let took = hangs_up(&mut silent, Duration::from_secs(5)).expect("a silent client is cut");
    assert!(took > least && took < most, "{took:?}");

    // One byte every 100 ms: never quiet, never done.
    let mut dribbling = server.connect();
    let began = Instant::now();
    let mut cut = None;
    for byte in b"GET /metrics HTTP/1.1\r\nX-Slow: aaaaaaaaaaaaaaaaaaaaaaaaaaaaa".iter() {
        if dribbling.write_all(&[*byte]).is_err() {
            cut = Some(began.elapsed());
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let took = cut.expect("a client that never finishes its header is cut");
    assert!(took > least && took < most, "{took:?}");

    // After a response the longer idle time counts …
    let mut idle = server.connect();
    idle.write_all(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let took = hangs_up(&mut idle, Duration::from_secs(5)).expect("an idle client is cut");
    assert!(
        took > Duration::from_millis(1300) && took < Duration::from_secs(5),
        "{took:?}"
    );
    // … until the next header begins.
    let mut second = server.connect();
    second
        .write_all(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    std::thread::sleep(Duration::from_millis(200));
    second.write_all(b"GET /-/heal").unwrap();
    let took = hangs_up(&mut second, Duration::from_secs(5)).expect("half a header is cut");
    assert!(took > least && took < most, "{took:?}");
}

#[test]
fn slow_readers_are_cut_and_count_as_in_flight() {
    let server = Start {
        limits: short(),
        padding: 24 << 20,
        max_requests: 1,
        ..Start::default()
    }
    .run();
    let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut slow = server.connect();
    slow.write_all(request).unwrap();
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(server.get("/metrics", "").status, 503);
    assert_eq!(server.get("/-/healthy", "").status, 200);
    // Reading a little now and then does not help.
    let began = Instant::now();
    let mut total = 0;
    let cut = loop {
        let mut buffer = [0; 2048];
        match slow.read(&mut buffer) {
            Ok(0) => break true,
            Ok(count) => total += count,
            Err(_) => break true,
        }
        if began.elapsed() > Duration::from_secs(6) {
            break false;
        }
        // Once cut, what is left in the buffers comes at once.
        if began.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    assert!(cut, "a reader this slow is cut");
    assert!(total < 24 << 20, "it cannot have had everything: {total}");
    // A reader that takes it all is served, and the place is free.
    let reply = server.get("/metrics", "");
    assert_eq!(reply.status, 200);
    assert!(reply.body.len() > 24 << 20);
}

#[test]
fn slow_readers_give_way_to_scrapes() {
    let server = Start {
        limits: Limits {
            slow_reader: Duration::from_millis(500),
            ..Limits::default()
        },
        padding: 24 << 20,
        max_requests: 2,
        ..Start::default()
    }
    .run();
    let mut slow = Vec::new();
    for _ in 0..2 {
        let mut stream = server.connect();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        slow.push(stream);
    }
    // Time enough for the rendering, too.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(server.get("/metrics", "").status, 200);
    assert!(hangs_up(&mut slow[0], Duration::from_secs(2)).is_some());
}

/// Bound to a source address of its own.
fn connect_from(last: u8, to: std::net::SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let source = std::net::SocketAddr::from(([127, 0, 0, last], 0));
    socket.bind(&source.into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

/// Sends a byte of a header every 4 ms over each of `streams` and begins anew
/// where it was cut off, until dropped.
struct Dribblers {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Dribblers {
    /// `count` connections, in turn from the loopback addresses that end in
    /// `sources`.
    fn start(count: usize, sources: std::ops::Range<u8>, to: std::net::SocketAddr) -> Self {
        const HEAD: &[u8] = b"GET /metrics HTTP/1.1\r\nX-Slow: ";
        let connect = move |number: usize| {
            let last = sources.clone().cycle().nth(number).unwrap();
            let stream = connect_from(last, to);
            stream.set_nonblocking(true).unwrap();
            (stream, 0)
        };
        let mut clients: Vec<_> = (0..count).map(&connect).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                for (number, (stream, sent)) in clients.iter_mut().enumerate() {
                    let byte = HEAD.get(*sent).unwrap_or(&b'a');
                    *sent += 1;
                    let open = match stream.write(&[*byte]) {
                        Ok(_) => true,
                        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
                    };
                    if !open {
                        (*stream, *sent) = connect(number);
                    }
                }
                std::thread::sleep(Duration::from_millis(4));
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Dribblers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().expect("the dribblers run until stopped");
        }
    }
}

/// The client is 20 ms away: that long after the handshake comes its request.
#[test]
fn dribbling_clients_lock_nobody_out() {
    let server = Start::default().run();
    let _dribblers = Dribblers::start(80, 2..7, server.address);
    std::thread::sleep(Duration::from_millis(300));
    for round in 0..20 {
        let mut stream = connect_from(200, server.address);
        stream
            .set_read_timeout(Some(Duration::from_secs(8)))
            .unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let mut bytes = Vec::new();
        let answered = stream
            .write_all(request)
            .and_then(|()| stream.read_to_end(&mut bytes));
        assert!(answered.is_ok(), "round {round}: {answered:?}");
        assert_eq!(parse(&bytes).status, 200, "round {round}");
    }
}

/// One address holds every place with answers that it does not read.
#[test]
fn slow_readers_of_one_address_lock_nobody_out() {
    let server = Start {
        padding: 24 << 20,
        max_requests: 4,
        ..Start::default()
    }
    .run();
    let mut slow = Vec::new();
    for _ in 0..4 {
        let mut stream = server.connect();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        // Of each an answer has begun, and none has been under way for long.
        stream.read_exact(&mut [0; 16]).unwrap();
        slow.push(stream);
    }
    let mut other = connect_from(200, server.address);
    other.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut bytes = Vec::new();
    other.read_to_end(&mut bytes).unwrap();
    assert_eq!(parse(&bytes).status, 200);
}

#[test]
fn max_requests_at_once_from_one_address_are_answered() {
    for max_requests in [40, 100] {
        let server = Start {
            max_requests,
            delay: Duration::from_millis(300),
            ..Start::default()
        }
        .run();
        for _ in 0..3 {
            let mut clients: Vec<_> = (0..max_requests).map(|_| server.connect()).collect();
            for client in &mut clients {
                let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
                client.write_all(request).unwrap();
            }
            for mut client in clients {
                let mut bytes = Vec::new();
                client.read_to_end(&mut bytes).unwrap();
                assert_eq!(parse(&bytes).status, 200);
            }
        }
    }
}

#[test]
fn many_peers_share_sixty_four_places() {
    let server = Start::default().run();
    let mut idle: Vec<_> = (0..300)
        .map(|number| connect_from(2 + (number / 10) as u8, server.address))
        .collect();
    let mut late = connect_from(200, server.address);
    late.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut bytes = Vec::new();
    late.read_to_end(&mut bytes).unwrap();
    assert_eq!(parse(&bytes).status, 200);
    std::thread::sleep(Duration::from_millis(200));
    let open = idle
        .iter_mut()
        .filter(|stream| {
            stream.set_nonblocking(true).unwrap();
            let mut stream: &TcpStream = stream;
            matches!(stream.read(&mut [0; 16]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
        })
        .count();
    assert!((32..=64).contains(&open), "{open}");
}

#[test]
fn a_panic_while_rendering_ends_the_server() {
    let server = Start {
        padding: usize::MAX,
        ..Start::default()
    }
    .run();
    let mut stream = server.connect();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    // At most a word that there will be no answer.
    assert!(bytes.is_empty() || parse(&bytes).status == 503);
    assert!(server.panicked());
}

#[test]
fn thousands_of_idle_connections_lock_nobody_out() {
    let server = Start::default().run();
    let mut idle = Vec::new();
    let began = Instant::now();
    for _ in 0..2000 {
        idle.push(TcpStream::connect(server.address).unwrap());
    }
    println!("2,000 connected in {:?}", began.elapsed());
    let began = Instant::now();
    for _ in 0..5 {
        assert_eq!(server.get("/metrics", "").status, 200);
        assert_eq!(server.get("/-/healthy", "").status, 200);
    }
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    println!("ten requests behind them in {:?}", began.elapsed());
    // No more are kept than there are places.
    std::thread::sleep(Duration::from_millis(300));
    let open = idle
        .iter_mut()
        .filter_map(|stream| {
            stream.set_nonblocking(true).unwrap();
            match stream.read(&mut [0; 16]) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Some(()),
                _ => None,
            }
        })
        .count();
    assert!(open <= 64, "{open}");
}

#[test]
fn a_thousand_scrapes_at_once_are_answered() {
    let server = Start {
        padding: 20_000,
        ..Start::default()
    }
    .run();
    let mut clients = Vec::new();
    for _ in 0..1000 {
        let mut stream = TcpStream::connect(server.address).unwrap();
        // A refused one may have been closed already.
        let _ = stream.write_all(
            b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n",
        );
        clients.push(stream);
    }
    let (mut ok, mut refused, mut lost) = (0, 0, 0);
    for mut client in clients {
        client
            .set_read_timeout(Some(Duration::from_secs(8)))
            .unwrap();
        let mut bytes = Vec::new();
        match client.read_to_end(&mut bytes) {
            Ok(_) if !bytes.is_empty() => match parse(&bytes).status {
                200 => ok += 1,
                503 => refused += 1,
                other => panic!("{other}"),
            },
            _ => lost += 1,
        }
    }
    println!("{ok} served, {refused} told to come back, {lost} lost");
    assert!(ok >= 40, "{ok} served, {refused} refused, {lost} lost");
    assert!(lost <= 100, "{ok} served, {refused} refused, {lost} lost");
    // Shared: far fewer renderings than answers.
    assert_eq!(server.get("/metrics", "").status, 200);
}

#[test]
fn both_families_and_several_addresses() {
    let server = Start {
        listen: vec!["127.0.0.1:0", ":0"],
        ..Start::default()
    }
    .run();
    assert_eq!(server.addresses.len(), 2);
    let any = server.addresses[1];
    let mut reached = vec![(server.address.ip(), server.address.port())];
    reached.push(("127.0.0.1".parse().unwrap(), any.port()));
    if any.is_ipv6() {
        reached.push(("::1".parse().unwrap(), any.port()));
    } else {
        println!("not applicable: dual stack: IPv6 is off on this host");
    }
    for address in reached {
        let mut stream = TcpStream::connect(address).unwrap();
        stream
            .write_all(b"GET /-/healthy HTTP/1.0\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.contains("connmon is healthy"), "{address:?}");
    }
}

#[test]
fn stopping_lets_requests_finish_and_is_quick() {
    let mut server = Start {
        delay: Duration::from_millis(200),
        ..Start::default()
    }
    .run();
    let mut idle = server.connect();
    let mut busy = server.connect();
    busy.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let took = server.stop();
    assert!(took < Duration::from_millis(900), "{took:?}");
    let mut bytes = Vec::new();
    busy.read_to_end(&mut bytes).unwrap();
    assert_eq!(parse(&bytes).status, 200);
    assert!(hangs_up(&mut idle, Duration::from_secs(1)).is_some());
}

/// Logs to stderr.
struct Stderr;

impl log::Log for Stderr {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        eprintln!("{}", record.args());
    }

    fn flush(&self) {}
}

/// What the child of the next test does: a server with three descriptors to
/// spare, until its standard input ends.
#[test]
fn emfile_child() {
    if std::env::var_os("CONNMON_TEST_EMFILE").is_none() {
        return;
    }
    log::set_logger(&Stderr).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let server = Start::default().run();
    // One request, so that everything lazily opened is open.
    assert_eq!(server.get("/metrics", "").status, 200);
    std::thread::sleep(Duration::from_millis(100));
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    // The listing itself was one.
    limit.current = Some(open - 1 + 3);
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    println!("address={}", server.address);
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn without_descriptors_idle_connections_close() {
    use std::process::{Command, Stdio};
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "emfile_child", "--nocapture", "--test-threads=1"])
        .env("CONNMON_TEST_EMFILE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let address: std::net::SocketAddr = loop {
        let line = lines.next().expect("the child prints its address").unwrap();
        // The harness may have written before on the same line.
        if let Some((_, address)) = line.split_once("address=") {
            break address.parse().unwrap();
        }
    };
    let idle: Vec<_> = (0..12)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(8)))
        .unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(parse(&bytes).status, 200);
    drop(idle);
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    assert!(log.contains("cannot accept HTTP connections"), "{log}");
}

#[test]
fn without_ipv6_it_listens_on_ipv4() {
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule,
    };
    // As on a host with ipv6.disable=1: this thread has no such sockets.
    std::thread::spawn(|| {
        let condition = SeccompCondition::new(
            0,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::Eq,
            libc::AF_INET6 as u64,
        )
        .unwrap();
        let rule = SeccompRule::new(vec![condition]).unwrap();
        let filter = SeccompFilter::new(
            [(libc::SYS_socket, vec![rule])].into(),
            SeccompAction::Allow,
            SeccompAction::Errno(libc::EAFNOSUPPORT as u32),
            std::env::consts::ARCH.try_into().unwrap(),
        )
        .unwrap();
        let program: BpfProgram = filter.try_into().unwrap();
        seccompiler::apply_filter(&program).unwrap();
        let server = Start {
            listen: vec![":0"],
            ..Start::default()
        }
        .run();
        assert!(server.address.is_ipv4(), "{}", server.address);
        let mut stream = TcpStream::connect(("127.0.0.1", server.address.port())).unwrap();
        stream
            .write_all(b"GET /-/healthy HTTP/1.0\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.contains("connmon is healthy"));
    })
    .join()
    .unwrap();
}
