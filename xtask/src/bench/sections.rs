//! What is measured, section by section.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::process::{self, Agent, Running, Tool, load, samples, sum};
use super::table::{Row, median, quantile};
use super::{Bench, programs};
use crate::{database, exec};

/// The load runs here …
const LOAD_CPU: usize = 0;
/// … and what is measured there.
const AGENT_CPU: &str = "1";
/// More processors than there are; taskset takes those that are.
const ALL_CPUS: &str = "0-1023";

const MEGABYTE: f64 = 1e6;

/// 240 alpha-2 codes; 127.N.0.0/16 is the N-th country.
const COUNTRIES: &str = "\
ADAEAFAGAIALAMAOAQARASATAUAWAXAZBABBBDBEBFBGBHBIBJBLBMBNBOBQBRBSBTBVBWBYBZCACCCD\
CFCGCHCICKCLCMCNCOCRCUCVCWCXCYCZDEDJDKDMDODZECEEEGEHERESETFIFJFKFMFOFRGAGBGDGEGF\
GGGHGIGLGMGNGPGQGRGSGTGUGWGYHKHMHNHRHTHUIDIEILIMINIOIQIRISITJEJMJOJPKEKGKHKIKMKN\
KPKRKWKYKZLALBLCLILKLRLSLTLULVLYMAMCMDMEMFMGMHMKMLMMMNMOMPMQMRMSMTMUMVMWMXMYMZNA\
NCNENFNGNINLNONPNRNUNZOMPAPEPFPGPHPKPLPMPNPRPSPTPWPYQARERORSRURWSASBSCSDSESGSHSI\
SJSKSLSMSNSOSRSSSTSVSXSYSZTCTDTFTGTHTJTKTLTMTNTOTRTTTVTWTZUAUGUMUSUYUZVAVCVEVGVI";

/// Values of `--traffic.interval` that are compared: the default, and none.
const SAMPLING: [&str; 2] = ["15s", "0"];

/// Who takes turns on the hook.
const CONTENDERS: [&str; 5] = [
    "connmon",
    "empty program",
    "tcplife",
    "tcpstates",
    "bpftrace",
];

/// bpftrace's programs on the hook of connmon's own: the least that any
/// program there costs, and one that counts.
const EMPTY: &str = "rawtracepoint:inet_sock_set_state { }";
const COUNTING: &str = "tracepoint:sock:inet_sock_set_state { @[args->newstate] = count(); }";

/// A contender, attached while the value lives.
fn attach(contender: &str) -> Result<Running> {
    let mut command = match contender {
        "connmon" => return Ok(Agent::start(AGENT_CPU, &[])?.process),
        "tcplife" | "tcpstates" => Command::new(format!("/usr/sbin/{contender}")),
        _ => Command::new("bpftrace"),
    };
    match contender {
        "empty program" => drop(command.args(["-e", EMPTY])),
        "bpftrace" => drop(command.args(["-e", COUNTING])),
        _ => {}
    }
    let running = Running::start(&mut command, AGENT_CPU)?;
    std::thread::sleep(Duration::from_millis(1500));
    Ok(running)
}

/// Three agents started one after the other, a bare dump after each; medians.
struct Starts {
    /// The last one, two seconds old.
    agent: Agent,
    first_scrape_s: f64,
    merge_s: f64,
    dump_s: f64,
}

impl Starts {
    const COUNT: usize = 3;

    fn new() -> Result<Self> {
        let (mut firsts, mut merges, mut dumps) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            // Both processors: nothing else runs, as on a host at its start.
            let agent = Agent::start(ALL_CPUS, &[])?;
            std::thread::sleep(Duration::from_secs(2));
            firsts.push(agent.first_scrape_s);
            merges.push(sum(&agent.scrape()?, "connmon_reconcile_duration_seconds"));
            dumps.push(process::output(&["discard"])?.trim().parse()?);
            if merges.len() == Self::COUNT {
                return Ok(Self {
                    agent,
                    first_scrape_s: median(&firsts),
                    merge_s: median(&merges),
                    dump_s: median(&dumps),
                });
            }
        }
    }
}

/// Percentages from pairs of measurements.
fn quartiles(pairs: &[f64]) -> String {
    let [low, median, high] = [0.25, 0.5, 0.75].map(|part| quantile(pairs, part));
    let pairs = pairs.len();
    format!("{median:.1} % (quartiles {low:.1} to {high:.1}, {pairs} pairs)")
}

/// Median of three times in seconds.
fn timed(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..3 {
        let started = std::time::Instant::now();
        work()?;
        times.push(started.elapsed().as_secs_f64());
    }
    Ok(median(&times))
}

fn quietly(program: &str, args: &[&str]) -> Result<()> {
    let mut command = Command::new(program);
    command.args(args).stdout(std::process::Stdio::null());
    exec::run(&mut command)
}

/// Holds that many sockets, two to a loopback connection.
fn hold(sockets: u32) -> Result<Vec<Tool>> {
    // A process may hold 20,000 descriptors.
    const PAIRS: u32 = 9_000;
    let mut left = sockets / 2;
    let mut holders = Vec::new();
    while left > 0 {
        let now = left.min(PAIRS).to_string();
        let network = (10 + holders.len()).to_string();
        holders.push(Tool::start(&[
            "hold",
            "--connections",
            &now,
            "--network",
            &network,
        ])?);
        left -= left.min(PAIRS);
    }
    Ok(holders)
}

impl Bench {
    pub(super) fn body(&mut self) -> Result<()> {
        let _stats = programs::Statistics::enable()?;
        let rounds = if self.quick { 3 } else { 8 };
        let mut costs: Vec<(&str, Vec<programs::Cost>)> =
            CONTENDERS.iter().map(|name| (*name, Vec::new())).collect();
        for _ in 0..rounds {
            for (contender, costs) in &mut costs {
                let before = programs::all()?;
                let Ok(attached) = attach(contender) else {
                    continue;
                };
                let start = programs::all()?;
                load(LOAD_CPU, 1.0, &["--close", "fin"])?;
                let end = programs::all()?;
                drop(attached);
                if let Some(cost) = programs::cost(&before, &start, &end) {
                    costs.push(cost);
                }
            }
        }
        let of = |name: &str, cost: fn(&programs::Cost) -> f64| -> f64 {
            let mut costs = costs.iter().filter(|(contender, _)| *contender == name);
            median(
                &costs
                    .next()
                    .map_or(Vec::new(), |(_, costs)| costs.iter().map(cost).collect()),
            )
        };
        let hit = |name| of(name, |cost| cost.hit);
        let (own, empty, tcplife) = (hit("connmon"), hit("empty program"), hit("tcplife"));
        let run = of("connmon", |cost| cost.run);
        self.rows.push(Row::bound(
            "kernel body per state event, FIN close, mean over all hits",
            "≤ 120 ns",
            format!(
                "{own:.0} ns, all its programs together; {run:.0} ns a run \
                 (empty program {empty:.0} ns)"
            ),
            own <= 120.0,
        ));
        self.rows.push(Row::bound(
            "the same against tcplife",
            "≤ 1/10",
            format!("1/{:.1} (tcplife {tcplife:.0} ns)", tcplife / own),
            own * 10.0 <= tcplife,
        ));
        for other in ["tcpstates", "bpftrace"] {
            self.rows.push(Row::context(
                format!("{other}, kernel body"),
                format!("{:.0} ns per hit", hit(other)),
            ));
        }
        Ok(())
    }

    pub(super) fn rate(&mut self) -> Result<()> {
        let rounds = if self.quick { 6 } else { 24 };
        let seconds = if self.quick { 0.5 } else { 1.0 };
        let mut lost: Vec<(&str, Vec<f64>)> =
            CONTENDERS.iter().map(|name| (*name, Vec::new())).collect();
        let mut rates = Vec::new();
        for _ in 0..rounds {
            for (contender, lost) in &mut lost {
                let before = load(LOAD_CPU, seconds, &[])?;
                let Ok(attached) = attach(contender) else {
                    continue;
                };
                let on = load(LOAD_CPU, seconds, &[])?;
                drop(attached);
                let after = load(LOAD_CPU, seconds, &[])?;
                rates.push((before + after) / 2.0);
                lost.push(100.0 * (1.0 - on * 2.0 / (before + after)));
            }
        }
        let [least, rate, most] = [0.0, 0.5, 1.0].map(|share| quantile(&rates, share));
        self.rows.push(Row::context(
            "connections per second without anything attached",
            format!("{rate:.0} ({least:.0}–{most:.0})"),
        ));
        for (contender, lost) in lost {
            if lost.is_empty() {
                self.rows
                    .push(Row::context(contender, "not to be had on this machine"));
                continue;
            }
            let (measured, median) = (quartiles(&lost), quantile(&lost, 0.5));
            let what = format!("connection rate lost at full speed: {contender}");
            self.rows.push(if contender == "connmon" {
                Row::bound(what, "≤ 2 %", measured, median <= 2.0)
            } else {
                Row::context(what, measured)
            });
        }
        Ok(())
    }

    pub(super) fn fold(&mut self) -> Result<()> {
        let mut command = exec::cargo();
        command.args([
            "bench",
            "--package",
            "connmon-core",
            "--bench",
            "fold",
            "--",
        ]);
        if self.quick {
            command.args(["--measurement-time", "2", "--warm-up-time", "1"]);
        }
        exec::run(&mut command)?;
        for (what, id, target) in programs::CRITERION {
            let rate = programs::criterion_rate(id)?;
            self.rows.push(Row::bound(
                what,
                format!("≥ {:.1} M/s", target / 1e6),
                format!("{:.2} M/s", rate / 1e6),
                rate >= target,
            ));
        }
        Ok(())
    }

    pub(super) fn drops(&mut self) -> Result<()> {
        let seconds = if self.quick { 10.0 } else { 60.0 };
        let agent = Agent::start(AGENT_CPU, &[])?;
        let rate = load(LOAD_CPU, seconds, &[])?;
        let scrape = agent.scrape()?;
        let (dropped, folded) = (
            sum(&scrape, "connmon_events_dropped_total"),
            sum(&scrape, "connmon_events_folded_total"),
        );
        self.rows.push(Row::bound(
            format!("events dropped in {seconds:.0} s at full speed"),
            "0",
            format!("{dropped} of {folded:.0} at {rate:.0} connections/s"),
            dropped == 0.0,
        ));
        Ok(())
    }

    pub(super) fn cpu(&mut self) -> Result<()> {
        let seconds = if self.quick { 10.0 } else { 60.0 };
        let agent = Agent::start(AGENT_CPU, &[])?;
        let share = |rate: &str| -> Result<(f64, f64)> {
            let before = agent.process.cpu_seconds()?;
            let made = load(LOAD_CPU, seconds, &["--rate", rate])?;
            Ok((
                100.0 * (agent.process.cpu_seconds()? - before) / seconds,
                made,
            ))
        };
        let (busy, made) = share("10000")?;
        let (idle, _) = share("10")?;
        self.rows.push(Row::bound(
            "agent CPU at 10,000 connections/s",
            "≤ 1.5 % of a core",
            format!("{busy:.2} % at {made:.0}/s (idle {idle:.2} %)"),
            busy <= 1.5,
        ));
        Ok(())
    }

    /// What sampling the bytes of live connections costs: agents with the
    /// default interval and without samples in turn.
    pub(super) fn traffic(&mut self) -> Result<()> {
        self.sampling_under_load()?;
        self.sampling_of_many()
    }

    /// As `rate` and `cpu` measure, by agents in turn, the first one
    /// alternating; each period has samples in it.
    fn sampling_under_load(&mut self) -> Result<()> {
        const PERIOD: f64 = 15.0;
        let rounds = if self.quick { 2 } else { 4 };
        let (mut slower, mut added, mut shares) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..rounds {
            let (mut rates, mut pair) = ([0.0; 2], [0.0; 2]);
            for at in [round % 2, 1 - round % 2] {
                let agent = Agent::start(AGENT_CPU, &["--traffic.interval", SAMPLING[at]])?;
                rates[at] = load(LOAD_CPU, PERIOD + 1.0, &[])?;
                let before = agent.process.cpu_seconds()?;
                load(LOAD_CPU, PERIOD, &["--rate", "10000"])?;
                pair[at] = 100.0 * (agent.process.cpu_seconds()? - before) / PERIOD;
            }
            slower.push(100.0 * (1.0 - rates[0] / rates[1]));
            shares.push(pair[0]);
            added.push(pair[0] - pair[1]);
        }
        self.rows.push(Row::context(
            "connection rate lost to sampling traffic",
            quartiles(&slower),
        ));
        self.rows.push(Row::context(
            "agent CPU that sampling traffic adds at 10,000 connections/s",
            format!(
                "{:.2} % of {:.2} % ({rounds} pairs)",
                median(&added),
                median(&shares)
            ),
        ));
        Ok(())
    }

    /// With many connections held and nothing else going on.
    fn sampling_of_many(&mut self) -> Result<()> {
        let (rounds, seconds) = if self.quick { (2, 16.0) } else { (4, 32.0) };
        let held = if self.quick { 20_000 } else { 100_000 };
        let _holders = hold(held)?;
        let mut added = Vec::new();
        let mut shares = Vec::new();
        for _ in 0..rounds {
            let mut pair = [0.0; 2];
            for (at, interval) in SAMPLING.into_iter().enumerate() {
                let agent = Agent::start(AGENT_CPU, &["--traffic.interval", interval])?;
                std::thread::sleep(Duration::from_secs(1));
                let before = agent.process.cpu_seconds()?;
                std::thread::sleep(Duration::from_secs_f64(seconds));
                pair[at] = 100.0 * (agent.process.cpu_seconds()? - before) / seconds;
            }
            shares.push(pair[0]);
            added.push(pair[0] - pair[1]);
        }
        self.rows.push(Row::bound(
            format!("agent CPU that sampling traffic adds, {held} connections held"),
            "≤ 0.5 % of a core",
            format!(
                "{:.2} % of {:.2} % ({rounds} pairs)",
                median(&added),
                median(&shares)
            ),
            median(&added) <= 0.5,
        ));
        Ok(())
    }

    pub(super) fn memory(&mut self) -> Result<()> {
        // Connections, and the bounds of megabytes and seconds, if any.
        let sizes: &[(u32, Option<f64>, Option<f64>)] = match self.quick {
            true => &[(0, Some(6.0), None), (100_000, Some(16.0), Some(0.10))],
            false => &[
                (0, Some(6.0), None),
                (10_000, None, None),
                (100_000, Some(16.0), Some(0.10)),
                (1_000_000, Some(96.0), Some(1.0)),
            ],
        };
        let mut base = 0.0;
        for &(connections, limit, merge_limit) in sizes {
            let _holders = hold(connections)?;
            let starts = Starts::new()?;
            let process = &starts.agent.process;
            let tracked = sum(&starts.agent.scrape()?, "connmon_tracked_connections");
            let anonymous = process.status_bytes("RssAnon")? as f64;
            let file = process.status_bytes("RssFile")? as f64;
            if connections == 0 {
                base = anonymous;
                self.start(&starts, file)?;
            }
            let each = (anonymous - base) / tracked.max(1.0);
            let what = format!("anonymous memory at {tracked:.0} connections");
            let measured = format!(
                "{:.1} MB, {each:.0} bytes a connection (file and ring pages {:.1} MB)",
                anonymous / MEGABYTE,
                file / MEGABYTE
            );
            self.rows.push(match limit {
                None => Row::context(what, measured),
                Some(limit) => {
                    let small = connections == 0 || each <= 96.0;
                    let reached = anonymous / MEGABYTE <= limit && small;
                    Row::bound(what, format!("≤ {limit:.0} MB"), measured, reached)
                }
            });
            if connections > 0 {
                self.merge(&starts, tracked, merge_limit)?;
            }
        }
        Ok(())
    }

    /// A start without connections.
    fn start(&mut self, starts: &Starts, file: f64) -> Result<()> {
        let peak = starts.agent.process.status_bytes("VmHWM")? as f64;
        self.rows.push(Row::bound(
            "peak resident size while starting, without ring and file pages",
            "≤ 32 MB",
            format!(
                "{:.1} MB ({:.1} MB with them)",
                (peak - file) / MEGABYTE,
                peak / MEGABYTE
            ),
            peak - file <= 32.0 * MEGABYTE,
        ));
        self.rows.push(Row::bound(
            "exec to first correct scrape",
            "≤ 150 ms",
            format!("{:.0} ms", starts.first_scrape_s * 1e3),
            starts.first_scrape_s <= 0.150,
        ));
        Ok(())
    }

    /// Reading many sockets, at the start and by other means.
    fn merge(&mut self, starts: &Starts, tracked: f64, limit: Option<f64>) -> Result<()> {
        self.rows.push(Row::context(
            format!("one look at {tracked:.0} sockets"),
            format!(
                "scrape {:.4} s; `ss -Htan` {:.3} s; reading /proc/net/tcp {:.3} s",
                timed(|| starts.agent.scrape().map(drop))?,
                timed(|| quietly("ss", &["-Htan"]))?,
                timed(|| quietly("cat", &["/proc/net/tcp", "/proc/net/tcp6"]))?,
            ),
        ));
        let (merge, dump) = (starts.merge_s, starts.dump_s);
        let what = format!("startup merge at {tracked:.0} sockets");
        let measured = format!(
            "{merge:.3} s ({:.2} of one read-and-discard, {dump:.3} s); exec to first scrape {:.3} s",
            merge / dump,
            starts.first_scrape_s,
        );
        self.rows.push(match limit {
            None => Row::context(what, measured),
            Some(limit) => Row::bound(what, format!("≤ {limit:.2} s"), measured, merge <= limit),
        });
        Ok(())
    }

    pub(super) fn scrape(&mut self) -> Result<()> {
        let scrapes = if self.quick { 300 } else { 2000 };
        let measure = |clients: u8, gzip: bool, address: String| -> Result<f64> {
            let (cpu, clients) = (LOAD_CPU.to_string(), clients.to_string());
            let scrapes = scrapes.to_string();
            let mut args = vec!["--cpu", &cpu, "scrape", "--address", &address];
            args.extend(["--clients", &clients, "--scrapes", &scrapes]);
            if gzip {
                args.push("--gzip");
            }
            let micros: Vec<f64> = process::output(&args)?
                .lines()
                .filter_map(|line| line.parse().ok())
                .collect();
            Ok(quantile(&micros, 0.99) / 1e3)
        };
        let database = exec::target_dir().join("bench.mmdb");
        // 127.0.0.0/16 stays loopback.
        let networks = (COUNTRIES.as_bytes().chunks(2).zip(1..=u8::MAX))
            .map(|(code, n)| (format!("127.{n}.0.0/16"), String::from_utf8_lossy(code)));
        database::make_up(&database, networks)?;
        let path = database.to_str().context("a path in UTF-8")?.to_owned();
        // Few, about 1,000 and about 10,000 samples.
        for (addresses, ports, limit) in [("1", "1", 1.0), ("15", "8", 1.0), ("240", "96", 5.0)] {
            let agent = Agent::start(AGENT_CPU, &["--geoip.database", &path])?;
            let _held = Tool::start(&["spread", "--addresses", addresses, "--ports", ports])?;
            let count = samples(&agent.scrape()?);
            let own = agent.address.to_string();
            let plain = measure(1, false, own.clone())?;
            let gzip = measure(1, true, own.clone())?;
            let crowd = measure(40, false, own)?;
            self.rows.push(Row::bound(
                format!("scrape p99, {count} samples"),
                format!("≤ {limit} ms"),
                format!("{plain:.2} ms (gzip {gzip:.2} ms)"),
                plain <= limit,
            ));
            self.rows.push(Row::bound(
                format!("scrape p99, {count} samples, 40 clients"),
                "≤ 20 ms",
                format!("{crowd:.2} ms"),
                crowd <= 20.0,
            ));
        }
        let address = process::free_address()?;
        let _node = Running::start(
            Command::new("prometheus-node-exporter").args([
                "--collector.disable-defaults",
                "--collector.tcpstat",
                &format!("--web.listen-address={address}"),
            ]),
            AGENT_CPU,
        )?;
        std::thread::sleep(Duration::from_secs(1));
        let count = samples(&exec::get(address, "/metrics")?);
        let node = measure(1, false, address.to_string())?;
        self.rows.push(Row::context(
            format!("node_exporter with tcpstat alone, scrape p99, {count} samples"),
            format!("{node:.2} ms"),
        ));
        Ok(())
    }

    pub(super) fn size(&mut self) -> Result<()> {
        let path = exec::target_dir().join("release/connmon");
        let file = fs::metadata(&path).with_context(|| path.display().to_string())?;
        let megabytes = file.len() as f64 / MEGABYTE;
        self.rows.push(Row::bound(
            "binary as released, stripped, database included",
            "≤ 14 MB",
            format!("{megabytes:.2} MB"),
            megabytes <= 14.0,
        ));
        Ok(())
    }
}
