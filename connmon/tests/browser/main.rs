//! The page in a real browser: what it shows, how it looks, what a screen reader
//! gets, what it loads, and what it does when the agent is gone. Screenshots are left
//! in `target/screenshots`.

mod fake;
mod webdriver;
// `support/sample.rs` names these by their short paths.
use connmon_core::probe::{AttachFailure, Method, Stage};
use connmon_core::{fold, geo, report};
#[path = "../support/sample.rs"]
mod sample;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use fake::Agent;
use fold::{Direction, Flow, PortLabel};
use geo::Country;
use report::Report;
use serde_json::Value;
use webdriver::{Browser, ENTER, TAB};

/// Everything the page loads, with headers, before it repeats itself.
const WIRE_BYTES_MAX: f64 = 40.0 * 1024.0;

/// One browser at a time: they are heavy.
static ONE: Mutex<()> = Mutex::new(());

/// A browser, or `None` after saying why there is none.
fn browser() -> Result<Option<(MutexGuard<'static, ()>, Browser)>> {
    match webdriver::find() {
        Ok((chromium, chromedriver)) => {
            let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
            let browser = Browser::start(&chromium, &chromedriver)?;
            Ok(Some((guard, browser)))
        }
        Err(reason) => {
            assert!(
                std::env::var_os("CI").is_none_or(|ci| ci != "true"),
                "the browser test must run in CI: {reason}"
            );
            println!("skipped: the page in a browser: {reason}");
            Ok(None)
        }
    }
}

macro_rules! browser_or_skip {
    () => {
        match browser()? {
            Some(browser) => browser,
            None => return Ok(()),
        }
    };
}

fn screenshots() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/screenshots")
}

/// A world's worth of connections: five orders of magnitude, big and tiny
/// countries, one without a shape. Marked as a demo, since its screenshots
/// are shown around.
fn world() -> Report {
    let mut report = sample::report();
    let countries = [
        ("DE", 48_210),
        ("US", 21_804),
        ("FR", 9_120),
        ("GB", 6_033),
        ("JP", 2_950),
        ("BR", 1_204),
        ("IN", 990),
        ("NL", 812),
        ("CA", 420),
        ("AU", 377),
        ("PL", 240),
        ("SE", 118),
        ("ES", 97),
        ("IT", 88),
        ("KR", 41),
        ("ZA", 23),
        ("MX", 17),
        ("SG", 12),
        ("NG", 6),
        ("AR", 4),
        ("GF", 3),
        ("LU", 2),
        ("MT", 1),
        ("EG", 0),
    ];
    report.snapshot.countries = countries
        .iter()
        .map(|&(code, n)| {
            let (inbound, outbound) = (n - n / 9, n / 9);
            let opened = [inbound * 12, outbound * 30 + 1, 0];
            let mut row = sample::country(Country::from_code(code), [inbound, outbound, 0], opened);
            row.flows[0].received_bytes = inbound * 51_234;
            row.flows[0].sent_bytes = inbound * 1_512_340;
            row.flows[1].received_bytes = outbound * 9_999;
            row.flows[1].sent_bytes = outbound * 2_999;
            row.failures[0] = n / 90;
            row
        })
        .chain([
            sample::country(Country::PRIVATE, [310, 84, 0], [4_000, 900, 0]),
            sample::country(Country::UNKNOWN, [3, 1, 0], [9, 2, 0]),
        ])
        .collect();
    let of = |direction: usize, number: fn(&Flow) -> u64| -> u64 {
        let rows = report.snapshot.countries.iter();
        rows.map(|row| number(&row.flows[direction])).sum()
    };
    let failures: u64 = {
        let rows = report.snapshot.countries.iter();
        rows.map(|row| row.failures[0]).sum()
    };
    // Services beside 443, which has the rest: port, connections by
    // direction, failures.
    let ports = [
        (80, [5_000, 400], 120),
        (22, [14, 6], 41),
        (5432, [0, 150], 12),
        (6379, [0, 60], 3),
        (9092, [0, 84], 0),
        (8080, [126, 0], 0),
    ];
    let mut rows = Vec::new();
    for direction in [Direction::Inbound, Direction::Outbound] {
        let way = direction as usize;
        let mut rest = sample::port(PortLabel::Port(443), direction, 0, 0);
        rest.flow = Flow {
            connections: of(way, |flow| flow.connections),
            opened: of(way, |flow| flow.opened),
            closed: of(way, |flow| flow.closed),
            received_bytes: of(way, |flow| flow.received_bytes),
            sent_bytes: of(way, |flow| flow.sent_bytes),
            retransmitted_segments: 0,
        };
        let mut failed = failures;
        for (port, connections, failures) in ports {
            let n = connections[way];
            if n == 0 {
                continue;
            }
            let mut row = sample::port(PortLabel::Port(port), direction, n, n * 12);
            row.flow.received_bytes = n * 4_321;
            row.flow.sent_bytes = n * 1_234;
            rest.flow.connections -= n;
            rest.flow.opened -= row.flow.opened;
            rest.flow.closed -= row.flow.closed;
            rest.flow.received_bytes -= row.flow.received_bytes;
            rest.flow.sent_bytes -= row.flow.sent_bytes;
            if let Some(counts) = &mut row.failures {
                counts[0] = failures;
                failed -= failures;
            }
            rows.push(row);
        }
        if let Some(counts) = &mut rest.failures {
            counts[0] = failed;
        }
        rows.push(rest);
    }
    let established = of(0, |flow| flow.connections) + of(1, |flow| flow.connections);
    report.snapshot.ports = rows;
    for direction in Direction::ALL {
        report
            .snapshot
            .ports
            .push(sample::port(PortLabel::Other, direction, 0, 0));
    }
    report.snapshot.audited_states = [3, 0, 40, 900, 25, 4, 0];
    let closing: u64 = report.snapshot.audited_states.iter().sum();
    report.snapshot.established = established;
    report.snapshot.tracked = established + closing;
    report.snapshot.corrections.seeded = closing;
    report.status.demo = true;
    report.status.uptime_s = 93_000.0;
    report.status.events_produced = 81_202_334;
    report.status.events_folded = 81_202_334;
    report.status.reconcile_duration_s = 0.087;
    report.status.namespaces = [14, 0, 0];
    // Twenty days ago, as seen by the browser.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    report.status.database.build_timestamp = now.as_secs() - 20 * 86_400;
    report
}

/// The same a little later, with something opened.
fn later(report: &Report, seconds: f64) -> Report {
    let mut report = report.clone();
    report.status.uptime_s += seconds;
    for row in &mut report.snapshot.countries {
        row.flows[0].opened += row.flows[0].connections / 40;
    }
    let ports = report.snapshot.ports.iter_mut();
    for row in ports.filter(|row| row.direction == Direction::Inbound) {
        row.flow.opened += row.flow.connections / 40;
    }
    report
}

/// What people are shown contradicts itself nowhere, rates included.
#[test]
fn the_world_adds_up() {
    let first = world();
    for report in [later(&first, 30.0), first] {
        let countries = report.snapshot.countries.iter().flat_map(|row| row.flows);
        let countries: Vec<Flow> = countries.collect();
        let ports: Vec<Flow> = report.snapshot.ports.iter().map(|row| row.flow).collect();
        for (what, slack, number) in [
            (
                "connections",
                0,
                (|flow| flow.connections) as fn(&Flow) -> u64,
            ),
            // What `later` adds is rounded down row by row.
            ("opened", 30, |flow| flow.opened),
            ("received", 0, |flow| flow.received_bytes),
            ("sent", 0, |flow| flow.sent_bytes),
        ] {
            let sum = |flows: &[Flow]| flows.iter().map(number).sum::<u64>();
            let apart = sum(&countries).abs_diff(sum(&ports));
            assert!(apart <= slack, "{what}: {apart}");
        }
        let countries = report.snapshot.countries.iter();
        let failed: u64 = countries.flat_map(|row| row.failures).sum();
        let ports = report.snapshot.ports.iter();
        let by_port: u64 = ports.flat_map(|row| row.failures).flatten().sum();
        assert_eq!(failed, by_port);
    }
}

/// The browser's complaints, a refused policy included.
fn complaints(browser: &Browser) -> Result<Vec<String>> {
    let entries = browser.log("browser")?;
    Ok(entries
        .iter()
        .map(|entry| entry["message"].to_string())
        .collect())
}

/// `[id, number, …]` of every row of a table, as read by a person, in order.
const ROWS: &str = "(id) => { \
    const box = document.getElementById(id); \
    if (box.parentElement.querySelector('.more[aria-expanded=false]:not([hidden])')) box.parentElement.querySelector('.more').click(); \
    return [...box.tBodies[0].rows].map((row) => [row.dataset.id, ...[...row.cells].slice(1).map((cell) => cell.textContent)]); }";

fn rows(browser: &Browser, table: &str) -> Result<Vec<Vec<String>>> {
    let rows = browser.eval(&format!("({ROWS})('{table}')"))?;
    Ok(serde_json::from_value(rows)?)
}

/// A count as the page writes it.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn number(by: &Value, direction: &str) -> u64 {
    match direction {
        "all" => ["inbound", "outbound", "unknown"]
            .iter()
            .map(|d| number(by, d))
            .sum(),
        direction => by[direction].as_u64().expect("a count by direction"),
    }
}

fn open(browser: &Browser, agent: &Agent) -> Result<()> {
    open_at(browser, &agent.url())
}

fn open_at(browser: &Browser, url: &str) -> Result<()> {
    browser.open(url)?;
    browser.wait_for(
        "the first answer",
        "document.querySelectorAll('#agent dd').length > 5",
    )?;
    browser.wait_for(
        "the map",
        "document.querySelectorAll('#map path').length === 174",
    )
}

#[test]
fn what_it_shows_is_the_summary() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let agent = Agent::start(world())?;
    open(&browser, &agent)?;
    let summary = agent.summary()?;
    for direction in ["all", "inbound", "outbound"] {
        browser.eval(&format!(
            "document.querySelector('#direction [value={direction}]').click()"
        ))?;
        for (table, key) in [("countries", "country"), ("ports", "port")] {
            let shown = rows(&browser, table)?;
            let given: Vec<_> = summary[table].as_array().context("rows")?.iter().collect();
            let unused = given.iter().filter(|row| row[key] == "other").count();
            assert_eq!(shown.len(), given.len() - unused, "rows of {table}");
            for row in shown {
                let of = given
                    .iter()
                    .find(|given| given[key] == *row[0])
                    .with_context(|| format!("{} is not in the summary", row[0]))?;
                let now = number(&of["connections"], direction);
                assert_eq!(
                    row[1],
                    grouped(now),
                    "{direction} connections of {}",
                    row[0]
                );
                let failures: u64 = of["failures"]
                    .as_object()
                    .context("failures")?
                    .values()
                    .filter_map(Value::as_u64)
                    .sum();
                let failures = if direction == "inbound" {
                    "–".to_owned()
                } else {
                    grouped(failures)
                };
                assert_eq!(row[3], failures, "{direction} failures of {}", row[0]);
            }
            for (at, key) in [(4, "received_bytes"), (5, "sent_bytes")] {
                let exact = browser.eval(&format!(
                    "[...document.querySelectorAll('#{table} tbody tr')].map((row) => [row.dataset.id, Number(row.cells[{at}].dataset.value)])"
                ))?;
                for pair in exact.as_array().context("pairs")? {
                    let id = if table == "ports" { "port" } else { "country" };
                    let of = given
                        .iter()
                        .find(|given| given[id] == pair[0])
                        .context("row")?;
                    assert_eq!(pair[1].as_f64(), Some(number(&of[key], direction) as f64));
                }
            }
        }
        let total: u64 = summary["countries"]
            .as_array()
            .context("countries")?
            .iter()
            .map(|row| number(&row["connections"], direction))
            .sum();
        assert_eq!(
            browser.eval("document.getElementById('t-now').textContent")?,
            grouped(total)
        );
    }
    assert_eq!(complaints(&browser)?, Vec::<String>::new());
    Ok(())
}

#[test]
fn it_loads_little_and_only_from_its_own_server() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let agent = Agent::start(world())?;
    browser.network()?;
    open(&browser, &agent)?;
    let mut wire = 0.0;
    let mut urls = Vec::new();
    let mut requests = Vec::new();
    let mut bodies = Vec::new();
    for event in browser.network()? {
        let parameters = &event["params"];
        match event["method"].as_str() {
            Some("Network.requestWillBeSent") => {
                let url = parameters["request"]["url"].as_str().context("url")?;
                // The empty tab that the browser starts with.
                if !url.starts_with("chrome:") && !url.starts_with("data:") {
                    urls.push(url.to_owned());
                    requests.push(parameters["requestId"].clone());
                }
            }
            Some("Network.responseReceived") => {
                let headers = &parameters["response"]["headers"];
                let find = |name: &str| {
                    let headers = headers.as_object()?;
                    let found = headers
                        .iter()
                        .find(|(key, _)| key.eq_ignore_ascii_case(name));
                    found.and_then(|(_, value)| value.as_str())
                };
                let url = parameters["response"]["url"].as_str().context("url")?;
                if !requests.contains(&parameters["requestId"]) {
                    continue;
                }
                let policy = find("content-security-policy").context("a page without policy")?;
                assert!(policy.contains("default-src 'none'"), "{policy}");
                assert!(!policy.contains("unsafe"), "{policy}");
                bodies.push((url.to_owned(), find("content-encoding").map(str::to_owned)));
            }
            Some("Network.loadingFinished") if requests.contains(&parameters["requestId"]) => {
                wire += parameters["encodedDataLength"].as_f64().context("length")?;
            }
            _ => {}
        }
    }
    assert!(
        urls.len() >= 5,
        "page, style, script, map, summary: {urls:?}"
    );
    for url in &urls {
        assert!(url.starts_with(&agent.url()), "{url} is another host's");
    }
    for (url, encoding) in &bodies {
        if !url.ends_with("icon.svg") {
            assert_eq!(encoding.as_deref(), Some("gzip"), "{url}");
        }
    }
    println!("over the wire: {wire} bytes in {} answers", bodies.len());
    assert!(wire < WIRE_BYTES_MAX, "{wire} bytes over the wire");
    Ok(())
}

/// As browsers let one log in.
#[test]
fn it_works_with_credentials_in_its_address() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let directory = tempfile::tempdir()?;
    let web_config = directory.path().join("web.yml");
    let hash = bcrypt::hash("pass:word", 4)?;
    std::fs::write(&web_config, format!("basic_auth_users:\n  user: {hash}\n"))?;
    let agent = Agent::start_with(
        &[("web.config.file", web_config.to_string_lossy().into_owned())],
        world(),
    )?;
    let url = format!("http://user:pass%3Aword@{}/", agent.address());
    open_at(&browser, &url)?;
    assert_eq!(complaints(&browser)?, Vec::<String>::new());
    Ok(())
}

#[test]
fn it_refreshes_itself_and_shows_rates() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let first = world();
    let agent = Agent::start(first.clone())?;
    open(&browser, &agent)?;
    let rate = "document.querySelector('#countries tr[data-id=DE]').cells[2].textContent";
    assert_eq!(browser.eval(rate)?, "–", "one answer makes no rate");
    browser.eval("window.loadedOnce = true")?;
    let mut second = later(&first, 10.0);
    second.snapshot.countries[0].flows[0].connections += 5;
    agent.set(second);
    // 42,854 inbound / 40 in ten seconds.
    browser.wait_for("the rate", &format!("{rate} === '107'"))?;
    let now = "document.querySelector('#countries tr[data-id=DE]').cells[1].textContent";
    assert_eq!(browser.eval(now)?, grouped(48_215));
    assert_eq!(browser.eval("window.loadedOnce")?, true, "it reloaded");
    Ok(())
}

#[test]
fn the_keyboard_reaches_everything() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let agent = Agent::start(world())?;
    open(&browser, &agent)?;
    let focused = "(() => { const e = document.activeElement; return e.closest('th')?.dataset.key ?? e.value ?? e.className; })()";
    browser.press(&[TAB])?;
    assert_eq!(
        browser.eval(focused)?,
        "skip",
        "the first stop skips to the tables"
    );
    browser.press(&[TAB])?;
    assert_eq!(browser.eval(focused)?, "all");
    browser.press(&['\u{e014}'])?; // right arrow
    browser.wait_for(
        "inbound",
        "document.querySelector('#direction [value=inbound]').checked",
    )?;
    browser.press(&[TAB])?;
    assert_eq!(browser.eval(focused)?, "name");
    assert_eq!(
        browser.eval("getComputedStyle(document.activeElement).outlineStyle")?,
        "solid",
        "focus can be seen"
    );
    browser.press(&[ENTER])?;
    let sorted = "document.querySelector('#countries [data-key=name]').getAttribute('aria-sort')";
    assert_eq!(browser.eval(sorted)?, "ascending");
    assert_eq!(
        browser.eval("document.querySelectorAll('#countries [aria-sort]').length")?,
        1
    );
    let first = "document.querySelector('#countries tbody tr').dataset.id";
    assert_eq!(browser.eval(first)?, "AR", "Argentina comes first by name");
    browser.press(&[ENTER])?;
    assert_eq!(browser.eval(sorted)?, "descending");
    assert_eq!(
        browser.eval(first)?,
        "unknown",
        "Unknown country comes last by name"
    );
    browser.press(&[TAB, ENTER])?;
    let counts = "[...document.querySelectorAll('#countries tbody tr')].map((row) => Number(row.cells[1].dataset.value))";
    let counts: Vec<f64> = serde_json::from_value(browser.eval(counts)?)?;
    assert!(counts.is_sorted_by(|a, b| a >= b), "{counts:?}");
    // What a screen reader gets.
    for (what, expression) in [
        (
            "the map has a description",
            "document.querySelector('#map svg[role=img]').ariaLabel.includes('table')",
        ),
        (
            "every column head has a scope",
            "[...document.querySelectorAll('thead th')].every((th) => th.scope === 'col')",
        ),
        (
            "every row has a head",
            "[...document.querySelectorAll('tbody tr')].every((tr) => tr.cells[0].scope === 'row')",
        ),
        (
            "every table has a name",
            "[...document.querySelectorAll('table')].every((t) => document.getElementById(t.getAttribute('aria-labelledby')))",
        ),
        (
            "the state is announced",
            "document.getElementById('state').role === 'status'",
        ),
        (
            "the direction is a named group",
            "document.querySelector('fieldset legend').textContent.length > 5",
        ),
        (
            "the language is set",
            "document.documentElement.lang === 'en'",
        ),
    ] {
        assert_eq!(browser.eval(expression)?, true, "{what}");
    }
    browser.prefer("prefers-reduced-motion", "reduce")?;
    assert_eq!(
        browser.eval("getComputedStyle(document.querySelector('#map path')).transitionProperty")?,
        "none"
    );
    Ok(())
}

/// Relative luminance of a computed colour, and contrast, after WCAG 2.
const CONTRAST: &str = "((a, b) => { \
    const l = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; }; \
    const [x, y] = [l(a), l(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); })";

#[test]
fn colours_grow_with_the_count_light_and_dark() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let agent = Agent::start(world())?;
    open(&browser, &agent)?;
    let fill = |code: &str| format!("getComputedStyle(document.getElementById('c-{code}')).fill");
    let style = |selector: &str, property: &str| {
        format!("getComputedStyle(document.querySelector('{selector}')).{property}")
    };
    for scheme in ["light", "dark"] {
        browser.prefer("prefers-color-scheme", scheme)?;
        // Fills fade in.
        std::thread::sleep(std::time::Duration::from_millis(900));
        let contrast = |a: &str, b: &str| -> Result<f64> {
            let contrast = browser.eval(&format!("{CONTRAST}({a}, {b})"))?;
            contrast.as_f64().context("a number")
        };
        let zero = fill("EG");
        // From one connection on, a country stands out from those without
        // by lightness alone, ever more so with the count.
        let mut least = 1.0;
        for code in ["MT", "NG", "ZA", "SE", "IN", "JP", "US", "DE"] {
            let now = contrast(&fill(code), &zero)?;
            assert!(now > least + 0.05, "{scheme}: {code} {now} after {least}");
            least = now;
        }
        assert!(
            contrast(&fill("MT"), &zero)? > 1.4,
            "{scheme}: one against none"
        );
        let card = style(".card", "backgroundColor");
        for (what, color) in [
            ("text", style("tbody th span", "color")),
            ("small text", style("tbody th small", "color")),
            ("links", style("footer a", "color")),
        ] {
            let contrast = contrast(&color, &card)?;
            assert!(contrast >= 4.5, "{scheme}: {what} has contrast {contrast}");
        }
        let pill = contrast(
            &style("#state", "color"),
            &style("#state", "backgroundColor"),
        )?;
        assert!(pill >= 4.5, "{scheme}: the state has contrast {pill}");
        agent.set(later(&world(), 30.0));
        browser.wait_for(
            "rates",
            "document.getElementById('t-rate').textContent !== '–'",
        )?;
        browser.viewport(1400, 1240, false)?;
        browser.screenshot(&screenshots().join(format!("page-{scheme}.png")), false)?;
    }
    let legend = browser.eval(
        "[...document.querySelectorAll('#ticks span')].map((s) => s.textContent).join(' ')",
    )?;
    assert_eq!(legend, "1 10 100 1K 50K");
    assert_eq!(
        browser.eval("document.querySelector('.zero').textContent")?,
        "0"
    );
    let off = browser.eval("document.getElementById('off').textContent")?;
    assert!(
        off.as_str()
            .is_some_and(|off| off.contains("French Guiana 3")),
        "{off}"
    );
    Ok(())
}

#[test]
fn it_fits_a_phone() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let agent = Agent::start(world())?;
    for (width, height) in [(320, 640), (390, 844), (768, 1024), (1100, 800)] {
        browser.viewport(width, height, width < 700)?;
        open(&browser, &agent)?;
        let scroll = browser.eval("document.documentElement.scrollWidth")?;
        assert!(
            scroll.as_u64().is_some_and(|scroll| scroll <= width.into()),
            "{scroll} pixels of content in {width}: {}",
            browser.eval("[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth).map((e) => e.tagName + '.' + e.className + ' ' + e.getBoundingClientRect().right).join('; ')")?
        );
        let spill = browser.eval(
            "[...document.querySelectorAll('td, th, dd, .card, #legend')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.textContent)",
        )?;
        assert_eq!(spill, Value::Array(Vec::new()), "cut off at {width}");
        browser.screenshot(&screenshots().join(format!("page-{width}.png")), true)?;
    }
    Ok(())
}

#[test]
fn it_explains_an_empty_map() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let mut report = sample::report();
    report
        .snapshot
        .countries
        .retain(|row| !row.country.is_public());
    report
        .snapshot
        .ports
        .retain(|row| row.port != PortLabel::Port(443));
    let agent = Agent::start(report.clone())?;
    open(&browser, &agent)?;
    let text = |id: &str| browser.eval(&format!("document.getElementById('{id}').innerText"));
    let shows = |id: &str, what: &str| -> Result<()> {
        let shown = text(id)?;
        assert!(
            shown.as_str().is_some_and(|shown| shown.contains(what)),
            "{what:?} in {shown}"
        );
        Ok(())
    };
    shows("empty", "No connection with a public address right now.")?;
    shows("empty", "There are 12 with private addresses")?;
    shows("empty", "34 loopback connections are hidden")?;
    shows("empty", "--filter.loopback include")?;
    shows("empty", "2 connections are hidden by --filter.exclude.")?;
    browser.screenshot(&screenshots().join("page-nothing-public.png"), false)?;
    report.snapshot.hidden_loopback = 0;
    report.snapshot.hidden_excluded = 0;
    report.snapshot.countries.clear();
    agent.set(report);
    browser.wait_for(
        "no rows",
        "document.querySelector('#countries .nothing') !== null",
    )?;
    shows("empty", "No other connection is counted.")?;
    shows("empty", "--filter.loopback include")?;
    assert_eq!(complaints(&browser)?, Vec::<String>::new());
    Ok(())
}

#[test]
fn it_shows_the_state_of_the_agent() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let agent = Agent::start(sample::report())?;
    open(&browser, &agent)?;
    let shows = |what: &str| {
        browser.wait_for(
            what,
            &format!("document.body.innerText.includes({})", Value::from(what)),
        )
    };
    shows("Live, every connection is counted")?;
    shows("tp_btf at inet_sock_set_state, the fastest method.")?;
    shows(
        "kprobe at tcp_connect. A faster method is not available: fentry: load: Operation not permitted (os error 1).",
    )?;
    shows("kretprobe at inet_csk_accept. A faster method is not available")?;
    shows("None: the last audit agreed with the kernel's socket tables.")?;
    shows("None of 4,321 events lost.")?;
    shows("DBIP-Country-Lite, built into connmon, of 2025-11-01")?;
    shows("IP Geolocation by DB-IP")?;
    shows("drawn as controlled de facto")?;
    assert_eq!(
        browser.eval("document.getElementById('demo').hidden")?,
        true
    );

    // Green is for right numbers, with or without the optional probes.
    let pill = |class: &str| -> Result<()> {
        let shown = browser.eval("document.getElementById('state').className")?;
        assert_eq!(shown, class);
        Ok(())
    };
    let mut report = sample::report();
    report.status.rungs[0].method = Method::Tracepoint;
    report.snapshot.traffic_known = false;
    report.status.rungs[2].method = Method::None;
    report.snapshot.accept_known = false;
    report.status.rungs[2].failures = vec![AttachFailure::new(
        Method::Kretprobe,
        Stage::Attach,
        "no such function",
    )];
    agent.set(report);
    shows(
        "Optional probe at inet_csk_accept not attached, so accept waits and accepting processes are not measured: kretprobe: no such function.",
    )?;
    shows("Bytes, retransmits and round-trip times are not measured here.")?;
    shows("Live, every connection is counted")?;
    pill("pill good")?;
    let mut report = sample::report();
    report.snapshot.drift = Some(40);
    agent.set(report);
    shows("Live, but the last audit corrected 40 connections")?;
    pill("pill warn")?;

    let mut report = sample::report();
    report.status.source = report::Source::Proc;
    report.status.degraded = Some("bpf() is refused (EPERM): CAP_BPF is missing".to_owned());
    report.status.demo = true;
    report.snapshot.drift = Some(40);
    report.status.dropped_ring_full = 12;
    report.snapshot.table_overflow = 3;
    report.snapshot.untracked = 2;
    report.status.namespaces = [1, 2, 1];
    report.status.database.source = "file";
    report.snapshot.traffic_known = false;
    agent.set(report);
    shows("Live but degraded: polling /proc")?;
    pill("pill warn")?;
    shows("Not eBPF because: bpf() is refused (EPERM): CAP_BPF is missing.")?;
    shows("Demo. The traffic on this page is made up")?;
    shows("The last audit corrected 40 connections of 70 tracked.")?;
    shows("12 events because the ring buffer was full")?;
    shows(
        "3 connections opened while the table was full (--connections.max), 2 of them open and in no gauge",
    )?;
    shows("1 read by sock_diag, 2 read from /proc, 1 not audited, known from events alone.")?;
    shows("--geoip.database takes a newer file")?;
    assert_eq!(
        browser.eval("document.querySelector('#countries tr[data-id=DE]').cells[4].textContent")?,
        "–",
        "unknown traffic is not zero"
    );
    for failures in [
        "document.querySelector('#countries tr[data-id=DE]').cells[3].textContent",
        "document.getElementById('t-failures').textContent",
    ] {
        assert_eq!(browser.eval(failures)?, "–", "polling has no failures");
    }
    assert_eq!(complaints(&browser)?, Vec::<String>::new());
    Ok(())
}

#[test]
fn hostile_names_are_only_text() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let mut report = sample::report();
    let hostile = "<img src=x onerror=\"document.title='owned'\">\u{202e}\n\"'</script>";
    report.snapshot.listeners[0].process = hostile.to_owned();
    report.status.database.database_type = hostile.to_owned();
    report.status.degraded = Some(hostile.to_owned());
    let agent = Agent::start(report)?;
    open(&browser, &agent)?;
    let shown =
        browser.eval("document.querySelector('#ports tr[data-id=\"22\"] small').textContent")?;
    assert_eq!(shown, format!("ssh, {hostile}"));
    assert_eq!(browser.eval("document.images.length")?, 0);
    assert_ne!(browser.eval("document.title")?, "owned");
    assert_eq!(complaints(&browser)?, Vec::<String>::new());
    Ok(())
}

#[test]
fn it_turns_stale_and_recovers_with_the_agent() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let agent = Agent::start_at("/probe/tcp", world())?;
    open(&browser, &agent)?;
    assert_eq!(
        browser.eval("document.getElementById('metrics').href")?,
        format!("{}probe/tcp", agent.url()),
        "the link follows the telemetry path"
    );
    let address = agent.address();
    agent.stop()?;
    browser.wait_for("the stale mark", "!document.getElementById('stale').hidden")?;
    let text = browser.eval("document.getElementById('stale-text').textContent")?;
    let text = text.as_str().context("text")?;
    assert!(
        text.contains("does not answer") && text.contains("What is shown is from"),
        "{text}"
    );
    assert_eq!(
        browser.eval("document.getElementById('state').textContent")?,
        "Stale"
    );
    assert_eq!(
        browser.eval("document.querySelector('#countries tr[data-id=DE]').cells[1].textContent")?,
        grouped(48_210),
        "the last numbers stay readable"
    );
    assert_eq!(
        browser.eval("getComputedStyle(document.querySelector('main')).opacity")?,
        "1",
        "faded text has too little contrast"
    );
    browser.screenshot(&screenshots().join("page-stale.png"), false)?;

    let mut restarted = world();
    restarted.status.uptime_s = 1.0;
    let _agent = Agent::start_on(address, "/probe/tcp", restarted)?;
    browser.eval("document.getElementById('retry').click()")?;
    browser.wait_for("the agent", "document.getElementById('stale').hidden")?;
    assert_eq!(
        browser.eval("document.getElementById('t-rate').textContent")?,
        "–",
        "no rate over a restart"
    );
    Ok(())
}

#[test]
fn it_shows_what_a_starting_agent_waits_for() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let mut report = world();
    report.status.ready = false;
    report.status.waiting_for = Some("the initial scan".to_owned());
    let agent = Agent::start(report)?;
    browser.open(&agent.url())?;
    browser.wait_for(
        "the reason",
        "document.getElementById('state').textContent === 'Not ready' && document.getElementById('stale-text').textContent.includes('the initial scan')",
    )?;
    // Another 503 is no start.
    agent.stop_reporting();
    browser.wait_for(
        "another reason",
        "document.getElementById('state').textContent === 'No answer' && document.getElementById('stale-text').textContent.startsWith('The agent has no numbers: ')",
    )?;
    agent.set(world());
    browser.eval("document.getElementById('retry').click()")?;
    browser.wait_for("numbers", "document.getElementById('stale').hidden")?;
    assert_eq!(
        browser.eval("document.getElementById('t-now').textContent")?,
        "92,970"
    );
    Ok(())
}

/// A finger is gone once it is lifted; what it tapped stays to be read.
#[test]
fn a_tap_shows_a_country_and_the_next_hides_it() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let agent = Agent::start(world())?;
    open(&browser, &agent)?;
    let touch = |selector: &str, event: &str| {
        browser.eval(&format!(
            "document.querySelector('{selector}').dispatchEvent(new PointerEvent('{event}', {{bubbles: '{event}' !== 'pointerleave', pointerType: 'touch', clientX: 300, clientY: 300}}))"
        ))
    };
    let hidden = "document.getElementById('tip').hidden";
    touch("#c-DE", "pointerdown")?;
    touch("#map", "pointerleave")?;
    assert_eq!(browser.eval(hidden)?, false, "lifting the finger hides it");
    let text = browser.eval("document.getElementById('tip').textContent")?;
    assert!(
        text.as_str()
            .is_some_and(|text| text.starts_with("Germany48,210 connections")),
        "{text}"
    );
    touch("#ports", "pointerdown")?;
    assert_eq!(browser.eval(hidden)?, true, "a tap elsewhere hides it");
    browser.eval("document.querySelector('#c-DE').dispatchEvent(new PointerEvent('pointermove', {bubbles: true, pointerType: 'mouse'}))")?;
    browser.eval("document.querySelector('#map').dispatchEvent(new PointerEvent('pointerleave', {pointerType: 'mouse'}))")?;
    assert_eq!(browser.eval(hidden)?, true, "a mouse that leaves hides it");
    Ok(())
}

/// Where the system's colours replace the page's, a background is invisible.
#[test]
fn the_chosen_direction_shows_in_forced_colours() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let agent = Agent::start(world())?;
    open(&browser, &agent)?;
    browser.prefer("forced-colors", "active")?;
    let outlines = "[...document.querySelectorAll('#direction input')].map((input) => [input.checked, getComputedStyle(input.nextElementSibling).outlineStyle].join(' ')).join(', ')";
    assert_eq!(
        browser.eval(outlines)?,
        "true solid, false none, false none"
    );
    Ok(())
}

/// Asking by hand while an answer is under way starts no second clock.
#[test]
fn it_asks_no_faster_than_every_two_seconds() -> Result<()> {
    let (_one, browser) = browser_or_skip!();
    let agent = Agent::start(world())?;
    open(&browser, &agent)?;
    browser.eval("[1, 2, 3, 4, 5].forEach(() => document.getElementById('retry').click())")?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    browser.network()?;
    std::thread::sleep(std::time::Duration::from_secs(5));
    let asked = browser
        .network()?
        .iter()
        .filter(|event| event["method"] == "Network.requestWillBeSent")
        .count();
    assert!((1..=3).contains(&asked), "{asked} requests in five seconds");
    Ok(())
}
