//! A browser under test: chromedriver started on a free port, spoken to by
//! the WebDriver protocol (<https://www.w3.org/TR/webdriver2/>), and ended
//! with the value.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use serde_json::{Value, json};
use tempfile::TempDir;

/// What the browser is given; nothing it does by itself may leave the host.
const FLAGS: [&str; 9] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
];

/// The key that WebDriver writes for Tab (its table of key values).
pub const TAB: char = '\u{e004}';
/// Enter.
pub const ENTER: char = '\u{e007}';

/// Where the browser and its driver are, or why the test cannot run.
pub fn find() -> std::result::Result<(PathBuf, PathBuf), String> {
    let in_path = |name: &str| {
        std::env::var_os("PATH")
            .into_iter()
            .flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>())
            .map(|directory| directory.join(name))
            .find(|path| path.is_file())
            .ok_or_else(|| format!("{name} is not in PATH (Debian: chromium, chromium-driver)"))
    };
    Ok((in_path("chromium")?, in_path("chromedriver")?))
}

/// A session with a headless Chromium.
pub struct Browser {
    driver: Child,
    session: String,
    agent: ureq::Agent,
    profile: TempDir,
    /// Held open, so that the driver can go on writing.
    _stdout: BufReader<ChildStdout>,
}

impl Browser {
    /// Starts driver and browser with an empty profile.
    pub fn start(chromium: &Path, chromedriver: &Path) -> Result<Self> {
        let profile = TempDir::with_prefix("connmon-browser-")?;
        let mut driver = Command::new(chromedriver)
            .arg("--port=0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", chromedriver.display()))?;
        let stdout = driver.stdout.take().context("chromedriver has no stdout")?;
        let mut stdout = BufReader::new(stdout);
        let port = driver_port(&mut stdout);
        let mut browser = Self {
            driver,
            session: String::new(),
            agent: ureq::Agent::config_builder()
                .http_status_as_error(false)
                .timeout_global(Some(Duration::from_secs(60)))
                .proxy(None)
                .build()
                .into(),
            profile,
            _stdout: stdout,
        };
        let port = port?;
        let mut flags: Vec<String> = FLAGS.iter().map(ToString::to_string).collect();
        flags.push(format!(
            "--user-data-dir={}",
            browser.profile.path().display()
        ));
        flags.push("--window-size=1400,1000".to_owned());
        browser.session = format!("http://127.0.0.1:{port}/session");
        let created = browser.post(
            "",
            &json!({"capabilities": {"alwaysMatch": {
                "browserName": "chrome",
                "goog:chromeOptions": {"binary": chromium, "args": flags},
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }}}),
        )?;
        let id = created["sessionId"].as_str().context("no session id")?;
        browser.session = format!("{}/{id}", browser.session);
        Ok(browser)
    }

    /// Loads a page.
    pub fn open(&self, url: &str) -> Result<()> {
        self.post("/url", &json!({ "url": url })).map(drop)
    }

    /// Evaluates an expression in the page.
    pub fn eval(&self, expression: &str) -> Result<Value> {
        let script = format!("return ({expression});");
        self.post("/execute/sync", &json!({"script": script, "args": []}))
    }

    /// Waits until an expression is true; the message names what for.
    pub fn wait_for(&self, what: &str, expression: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if self.eval(expression)? == Value::Bool(true) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let body = self.eval("document.body.innerText")?;
                bail!("waited in vain for {what}: {expression}; the page shows {body}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Presses and releases keys, one after the other.
    pub fn press(&self, keys: &[char]) -> Result<()> {
        let actions: Vec<Value> = keys
            .iter()
            .flat_map(|key| {
                [
                    json!({"type": "keyDown", "value": key}),
                    json!({"type": "keyUp", "value": key}),
                ]
            })
            .collect();
        let body = json!({"actions": [{"type": "key", "id": "keyboard", "actions": actions}]});
        self.post("/actions", &body).map(drop)
    }

    /// Sends a DevTools command.
    pub fn devtools(&self, command: &str, parameters: Value) -> Result<Value> {
        let body = json!({"cmd": command, "params": parameters});
        self.post("/goog/cdp/execute", &body)
    }

    /// Emulates a viewport of so many CSS pixels.
    pub fn viewport(&self, width: u32, height: u32, mobile: bool) -> Result<()> {
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}),
        )
        .map(drop)
    }

    /// Emulates a user's preferences, e.g. `prefers-color-scheme: dark`.
    pub fn prefer(&self, feature: &str, value: &str) -> Result<()> {
        self.devtools(
            "Emulation.setEmulatedMedia",
            json!({"features": [{"name": feature, "value": value}]}),
        )
        .map(drop)
    }

    /// Entries of a log (`browser` is the console) since it was last read.
    pub fn log(&self, kind: &str) -> Result<Vec<Value>> {
        match self.post("/se/log", &json!({ "type": kind }))? {
            Value::Array(entries) => Ok(entries),
            other => bail!("log {kind} is not a list: {other}"),
        }
    }

    /// DevTools network events since the log was last read.
    pub fn network(&self) -> Result<Vec<Value>> {
        let mut events = Vec::new();
        for entry in self.log("performance")? {
            let text = entry["message"].as_str().context("no message")?;
            let message: Value = serde_json::from_str(text)?;
            events.push(message["message"].clone());
        }
        Ok(events)
    }

    /// Saves what is seen as a PNG; with `full`, the whole page.
    pub fn screenshot(&self, path: &Path, full: bool) -> Result<()> {
        let shot = self.devtools(
            "Page.captureScreenshot",
            json!({"format": "png", "captureBeyondViewport": full}),
        )?;
        let data = shot["data"].as_str().context("no screenshot")?;
        let png = base64::engine::general_purpose::STANDARD.decode(data)?;
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        std::fs::write(path, png).with_context(|| format!("cannot write {}", path.display()))
    }

    fn post(&self, command: &str, body: &Value) -> Result<Value> {
        let url = format!("{}{command}", self.session);
        let mut response = self.agent.post(&url).send_json(body)?;
        let answer: Value = response
            .body_mut()
            .with_config()
            .limit(64 << 20)
            .read_json()?;
        ensure!(
            response.status().is_success(),
            "{command} {body}: {} {}",
            response.status(),
            answer["value"]["message"]
        );
        Ok(answer["value"].clone())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ends the browser; the driver alone would leave it behind.
        let _ = self.agent.delete(&self.session).call();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

/// "ChromeDriver was started successfully on port 12345."
fn driver_port(stdout: impl BufRead) -> Result<u16> {
    for line in stdout.lines() {
        let line = line?;
        if let Some((_, rest)) = line.split_once("started successfully on port ") {
            let digits = rest.trim_end_matches(|c: char| !c.is_ascii_digit());
            return digits.parse().with_context(|| format!("port in {line:?}"));
        }
    }
    bail!("chromedriver ended without naming its port")
}
