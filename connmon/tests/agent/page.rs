//! The page over live connections: browser, summary and scrape show the same.

use std::path::Path;

use serde_json::Value;

use crate::harness::{Agent, Scrape};
use crate::namespaces;
use crate::support::skipped;
use crate::traffic::Pair;
use crate::webdriver::{self, Browser};
use crate::world::World;

/// Where two connections move 3000 bytes up and 70 down, and three are
/// refused.
const PORT: u16 = 6004;

/// Connections, failures, bytes received and sent.
type Figures = [Option<f64>; 4];

const MOVED: Figures = [Some(2.0), Some(3.0), Some(140.0), Some(6000.0)];

/// A row of the page's tables, of the summary, of a scrape.
struct Row {
    label: &'static str,
    id: String,
}

impl Row {
    fn country(code: &str) -> Self {
        Self {
            label: "country",
            id: code.to_owned(),
        }
    }

    fn port(port: u16) -> Self {
        Self {
            label: "port",
            id: port.to_string(),
        }
    }

    fn table(&self) -> &'static str {
        match self.label {
            "country" => "countries",
            _ => "ports",
        }
    }

    fn scraped(&self, scrape: &Scrape, direction: &str) -> Figures {
        let family = |name: &str| format!("connmon_{}_{name}", self.label);
        let row = (self.label, self.id.as_str());
        let directed = |name: &str| {
            let family = family(name);
            let sum = scrape.sum(&family, &[row, ("direction", direction)]);
            scrape.has(&family).then_some(sum)
        };
        let failures = scrape.sum(&family("connect_failures_total"), &[row]);
        [
            directed("connections"),
            // Only active opens fail.
            (direction == "outbound").then_some(failures),
            directed("received_bytes_total"),
            directed("sent_bytes_total"),
        ]
    }

    fn summed(&self, summary: &Value, direction: &str) -> Figures {
        let rows = summary[self.table()].as_array().unwrap();
        let row = rows.iter().find(|row| row[self.label] == *self.id).unwrap();
        let failures = row["failures"].as_object().unwrap().values();
        let failures: f64 = failures.map(|count| count.as_f64().unwrap()).sum();
        [
            row["connections"][direction].as_f64(),
            (direction == "outbound").then_some(failures),
            row["received_bytes"][direction].as_f64(),
            row["sent_bytes"][direction].as_f64(),
        ]
    }

    /// Of the direction that the page is switched to.
    fn shown(&self, browser: &Browser, direction: &str) -> Figures {
        let cell = |key: &str, property: &str| {
            let (table, id) = (self.table(), &self.id);
            let cell = format!("#{table} tr[data-id=\"{id}\"] [data-key={key}]");
            let value = format!("document.querySelector('{cell}').{property} ?? null");
            let value = browser.eval(&value).unwrap();
            value.as_str().map(str::to_owned)
        };
        let columns = ["now", "failures", "received", "sent"];
        // Small numbers are shown unabbreviated.
        for key in &columns[..2] {
            let text = cell(key, "textContent").unwrap();
            let value = cell(key, "dataset.value").unwrap_or("–".to_owned());
            assert_eq!(text, value, "{key} of {} {direction}", self.id);
        }
        columns.map(|key| Some(cell(key, "dataset.value")?.parse().unwrap()))
    }
}

#[test]
fn what_the_page_shows_is_what_is_connected() {
    if !namespaces::may_run("the page over live connections") {
        return;
    }
    let (chromium, chromedriver) = match webdriver::find() {
        Ok(found) => found,
        Err(reason) => return skipped("the page over live connections", &reason),
    };
    let world = World::new();
    let database = world.database();
    // Before the agent starts, in a namespace without a process: the walker has
    // to find it by its mount, from inside its sandbox.
    let before = world.inbound("DE", 22, 40);
    let agent = Agent::start(&[
        "--geoip.database",
        database.to_str().unwrap(),
        "--traffic.interval",
        "500ms",
    ]);
    // Traffic both ways, then refusals of the same port.
    let listener = world.listen(PORT);
    let mut moving = Vec::new();
    for client in world.outbound("US", PORT, 2) {
        let (server, _) = listener.accept().unwrap();
        let mut pair = Pair { client, server };
        pair.exchange(3000, 70);
        moving.push(pair);
    }
    drop(listener);
    for _ in 0..3 {
        world.refused("US", PORT);
    }
    let held = [
        ("DE", "inbound", before),
        ("US", "inbound", world.inbound("US", 80, 7)),
        ("JP", "outbound", world.outbound("JP", 443, 12)),
        ("MT", "outbound", world.outbound("MT", 5432, 1)),
    ];
    agent.until("what is held is counted", |scrape| {
        held.iter().all(|(country, direction, streams)| {
            let row = Row::country(country);
            row.scraped(scrape, direction)[0] == Some(streams.len() as f64)
        }) && Row::port(PORT).scraped(scrape, "outbound") == MOVED
            && Row::port(PORT).scraped(scrape, "inbound")[2] == Some(6000.0)
    });
    let browser = Browser::start(&chromium, &chromedriver).unwrap();
    browser
        .open(&format!("http://{}/", agent.address()))
        .unwrap();
    browser
        .wait_for("the countries", "document.querySelector('#countries tr[data-id=MT]') !== null && document.querySelectorAll('#map path').length === 174")
        .unwrap();
    let summary: Value = serde_json::from_str(&agent.get("/api/v1/summary")).unwrap();
    let scrape = agent.scrape();
    let countries = ["DE", "US", "JP", "MT"].map(Row::country);
    for direction in ["inbound", "outbound"] {
        browser
            .eval(&format!(
                "document.querySelector('#direction [value={direction}]').click()"
            ))
            .unwrap();
        for row in countries.iter().chain([&Row::port(PORT)]) {
            let scraped = row.scraped(&scrape, direction);
            let what = format!("{} {} {direction}", row.label, row.id);
            assert_eq!(row.summed(&summary, direction), scraped, "{what}: summary");
            assert_eq!(row.shown(&browser, direction), scraped, "{what}: page");
        }
    }
    // And they are what this test did.
    assert_eq!(Row::country("US").scraped(&scrape, "outbound"), MOVED);
    assert_eq!(
        Row::country("DE").scraped(&scrape, "inbound")[0],
        Some(40.0)
    );
    browser
        .eval("document.querySelector('#direction [value=all]').click()")
        .unwrap();
    // A new connection appears without a reload.
    let more = world.inbound("BR", 22, 3);
    browser
        .wait_for(
            "a new country",
            &format!(
                "document.querySelector('#countries tr[data-id=BR]') !== null && {} === '3'",
                "document.querySelector('#countries tr[data-id=BR]').cells[1].textContent"
            ),
        )
        .unwrap();
    assert_eq!(
        browser
            .eval("document.getElementById('c-BR').classList.contains('on')")
            .unwrap(),
        true,
        "on the map too"
    );
    let shots = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/screenshots");
    browser
        .screenshot(&shots.join("page-live.png"), true)
        .unwrap();
    let complaints = browser.log("browser").unwrap();
    assert!(complaints.is_empty(), "{complaints:?}");
    drop(browser);
    drop((held, more, moving));
    agent.stop();
}
