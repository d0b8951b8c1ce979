//! `cargo xtask bench`: what connmon costs, beside what others cost, in the
//! same minutes on the same machine.

mod process;
mod programs;
mod table;
pub mod tool;

use std::fs;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::{database, exec, install};
use process::{Agent, Running, Tool, load, samples, sum};
use table::{Row, markdown, median, quantile};

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

/// `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Fewer rounds and shorter loads: three minutes instead of twenty
    #[arg(long)]
    quick: bool,
    /// Only these sections, by the first word of their name
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

struct Bench {
    quick: bool,
    rows: Vec<Row>,
}

type Section = (&'static str, fn(&mut Bench) -> Result<()>);

const SECTIONS: [Section; 9] = [
    ("body", Bench::body),
    ("rate", Bench::rate),
    ("fold", Bench::fold),
    ("drops", Bench::drops),
    ("cpu", Bench::cpu),
    ("traffic", Bench::traffic),
    ("memory", Bench::memory),
    ("scrape", Bench::scrape),
    ("size", Bench::size),
];

/// Builds, measures, writes `target/bench.json`, and BENCHMARKS.md once that
/// has every section. A section that was not measured now keeps its rows.
///
/// # Errors
/// When a contender cannot be built or started.
pub fn run(args: &Args) -> Result<ExitCode> {
    anyhow::ensure!(exec::is_root(), "bench needs root: it attaches programs");
    install::contenders()?;
    exec::run(exec::cargo().args(["build", "--release", "--locked", "--package", "connmon"]))?;
    let json = exec::target_dir().join("bench.json");
    let earlier: Vec<Row> = (fs::read(&json).ok())
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    let mut rows = Vec::new();
    let mut missing = Vec::new();
    for (name, section) in SECTIONS {
        let first = rows.len();
        if !args.only.is_empty() && !args.only.iter().any(|only| only == name) {
            rows.extend(earlier.iter().filter(|row| row.section == name).cloned());
            if rows.len() == first {
                missing.push(name);
            }
            continue;
        }
        eprintln!("== {name}");
        let mut bench = Bench {
            quick: args.quick,
            rows: Vec::new(),
        };
        if let Err(error) = section(&mut bench) {
            // A contender that this machine cannot have must not hide the rest.
            bench
                .rows
                .push(Row::context(name, format!("not measured: {error:#}")));
        }
        eprint!("{}", markdown(&bench.rows));
        rows.extend(bench.rows.into_iter().map(|row| Row {
            section: name.to_owned(),
            ..row
        }));
    }
    fs::write(json, serde_json::to_vec_pretty(&rows)?)?;
    let document = document(args.quick, &rows)?;
    if missing.is_empty() {
        let path = exec::root().join("BENCHMARKS.md");
        // What people wrote about misses stays.
        let before = fs::read_to_string(&path).unwrap_or_default();
        let notes = before.find("\n## Misses").map_or("", |at| &before[at..]);
        fs::write(path, format!("{document}{notes}"))?;
        println!("wrote BENCHMARKS.md and target/bench.json");
    } else {
        println!(
            "{document}\nBENCHMARKS.md stays: never measured here: {}",
            missing.join(", ")
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn document(quick: bool, rows: &[Row]) -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1))
        .unwrap_or("unknown processor");
    let cpus = std::thread::available_parallelism()?;
    Ok(format!(
        "# Benchmarks\n\n\
         Written by `cargo xtask bench{}` as root on {cpus} virtual processors ({}), Linux {}. \
         The load is pinned to one processor and what is measured to the other; contenders take \
         turns in rounds, and ratios are medians of pairs within a round, so a machine that drifts \
         does not favour anybody. Absolute times are this machine's; ratios carry over. Misses stand \
         in bold.\n\n{}\n\
         How to repeat it: `cargo xtask bench` (half an hour) or `cargo xtask bench --quick` (some \
         minutes), as root on a quiet machine.\n",
        if quick { " --quick" } else { "" },
        model.trim(),
        release.trim(),
        markdown(rows),
    ))
}

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
    fn body(&mut self) -> Result<()> {
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

    fn rate(&mut self) -> Result<()> {
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

    fn fold(&mut self) -> Result<()> {
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

    fn drops(&mut self) -> Result<()> {
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

    fn cpu(&mut self) -> Result<()> {
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
    fn traffic(&mut self) -> Result<()> {
        self.sampling_under_load()?;
        self.sampling_of_many()
    }

    /// As `rate` and `cpu` measure, by agents in turn, the first one
    /// alternating; each figure's time has samples in it.
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

    fn memory(&mut self) -> Result<()> {
        let sizes: &[(u32, f64, f64)] = if self.quick {
            &[(0, 6.0, f64::NAN), (100_000, 16.0, 0.10)]
        } else {
            &[
                (0, 6.0, f64::NAN),
                (10_000, f64::NAN, f64::NAN),
                (100_000, 16.0, 0.10),
                (1_000_000, 96.0, 1.0),
            ]
        };
        let mut base = 0.0;
        for &(connections, limit, merge_limit) in sizes {
            let _holders = hold(connections)?;
            let Starts {
                agent,
                first_scrape_s,
                merge_s: merge,
                dump_s: dump,
            } = Starts::new()?;
            let tracked = sum(&agent.scrape()?, "connmon_tracked_connections");
            let anonymous = agent.process.status_bytes("RssAnon")? as f64;
            let file = agent.process.status_bytes("RssFile")? as f64;
            let peak = agent.process.status_bytes("VmHWM")? as f64;
            if connections == 0 {
                base = anonymous;
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
                    format!("{:.0} ms", first_scrape_s * 1e3),
                    first_scrape_s <= 0.150,
                ));
            }
            let each = (anonymous - base) / tracked.max(1.0);
            let what = format!("anonymous memory at {tracked:.0} connections");
            let measured = format!(
                "{:.1} MB, {each:.0} bytes a connection (file and ring pages {:.1} MB)",
                anonymous / MEGABYTE,
                file / MEGABYTE
            );
            self.rows.push(if limit.is_nan() {
                Row::context(what, measured)
            } else {
                let reached = anonymous / MEGABYTE <= limit && (connections == 0 || each <= 96.0);
                Row::bound(what, format!("≤ {limit:.0} MB"), measured, reached)
            });
            if connections > 0 {
                self.rows.push(Row::context(
                    format!("one look at {tracked:.0} sockets"),
                    format!(
                        "scrape {:.4} s; `ss -Htan` {:.3} s; reading /proc/net/tcp {:.3} s",
                        timed(|| agent.scrape().map(drop))?,
                        timed(|| quietly("ss", &["-Htan"]))?,
                        timed(|| quietly("cat", &["/proc/net/tcp", "/proc/net/tcp6"]))?,
                    ),
                ));
                let what = format!("startup merge at {tracked:.0} sockets");
                let measured = format!(
                    "{merge:.3} s ({:.2} of one read-and-discard, {dump:.3} s); exec to first scrape {first_scrape_s:.3} s",
                    merge / dump,
                );
                self.rows.push(if merge_limit.is_nan() {
                    Row::context(what, measured)
                } else {
                    Row::bound(
                        what,
                        format!("≤ {merge_limit:.2} s"),
                        measured,
                        merge <= merge_limit,
                    )
                });
            }
        }
        Ok(())
    }

    fn scrape(&mut self) -> Result<()> {
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

    fn size(&mut self) -> Result<()> {
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
