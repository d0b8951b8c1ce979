//! The only wiring: threads, channels and shutdown of the agent.
//!
//! Three threads work: the walker (socket tables), the fold (ring buffer,
//! state) and this one (HTTP, signals, files). They send each other messages
//! and share only what does not change. A fourth writes the log.

mod pipeline;
mod reporter;
mod schedule;
mod serve;
mod startup;
mod status;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Context as _;
use connmon_core::event::{LiveSocket, NetnsId};
use connmon_core::fold::{Fold, FoldConfig, RemoteFilter};
use connmon_core::geo::{Database, Locator};
use connmon_core::probe::{AttachFailure, Method, Rung, Stage};
use connmon_core::report::Source;
use connmon_host::kernel::{Tracer, TracerOptions};
use connmon_host::reconcile::netns::Roots;
use connmon_host::reconcile::{SocketSource, WalkMessages, Walker, WalkerOptions};
use connmon_host::sandbox::{self, Plan, Role};
use connmon_http::{ServeError, Server};
use log::{debug, warn};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot, watch};

use crate::config::{Config, SourceChoice};
use crate::database::Reloader;
use crate::logging;
use crate::notify::Notify;

use pipeline::{Inputs, Pipeline};
use serve::{AgentContent, DatabaseWatch, Serving, Signals};
use status::StatusBoard;

/// Exit code after a panic in any thread; Rust's own.
const PANIC_EXIT: i32 = 101;

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from running, in one line; a [`crate::config::ConfigError`] where the
/// configuration is to blame.
pub fn run(config: Config) -> anyhow::Result<()> {
    logging::write_in_background().context("cannot start the log thread")?;
    exit_on_panic();
    connmon_host::kernel::return_memory_at_once();
    let runtime = runtime().context("cannot start the serving runtime")?;
    // First, so that a signal during a slow start ends the agent cleanly too.
    let signals = {
        let _runtime = runtime.enter();
        Signals::new()?
    };
    let (reloader, database) = open_database(&config)?;
    let database = Arc::new(database);
    let server = bind(&config)?;
    let host = Roots::default()
        .host()
        .context("cannot read /proc/self/ns/net; is /proc mounted?")?;
    let mut attached = attach(&config, host)?;
    let plan = sandbox_plan(&config, &server);
    let (walker, messages) = spawn_walker(&config, &plan, attached.tracer.as_mut())?;
    if let Some(tracer) = &mut attached.tracer {
        tracer.close_maps();
    }

    let (reporter, requests) = reporter::channel();
    let (databases, new_databases) = mpsc::channel(1);
    let (stop, stopping) = watch::channel(false);
    let (ready, is_ready) = watch::channel(false);
    let inputs = Inputs {
        messages,
        requests,
        databases: new_databases,
        shutdown: stopping,
    };
    let mut when_ready = Vec::from_iter(server.url().map(|url| urls(&url, &config)));
    when_ready.extend(attached.not_measured());
    let pipeline = pipeline(&config, host, attached, &database, walker, ready);
    let (fold_thread, fold_ended) = spawn_fold(pipeline, inputs, &plan)?;
    let serving = {
        let _runtime = runtime.enter();
        Serving {
            server,
            content: AgentContent::new(&config.telemetry_path),
            reporter,
            when_ready,
            ready: is_ready,
            fold_ended,
            stop,
            signals,
            database: DatabaseWatch {
                reloader,
                current: database,
                fold: databases,
            },
            notify: Notify::from_env(),
        }
    };
    let result = runtime.block_on(serving.run(&plan));
    // Does not wait for the check of a database or a password.
    runtime.shutdown_background();
    // The fold thread stops on request; after an error the process ends anyway.
    if result.is_ok() {
        drop(fold_thread.join());
    }
    result
}

fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

/// The second line of the log at info.
fn urls(url: &str, config: &Config) -> String {
    let telemetry = config.telemetry_path.trim_start_matches('/');
    let demo = if config.demo { " of a demo" } else { "" };
    format!("{url} shows the map{demo}, {url}{telemetry} the metrics")
}

/// What each thread may still do; the log thread enters its sandbox at once.
fn sandbox_plan(config: &Config, server: &Server) -> Arc<Plan> {
    let mut plan = config.sandbox_plan();
    for file in server.files() {
        plan.also_readable(file);
    }
    let plan = Arc::new(plan);
    logging::enter_sandbox({
        let plan = Arc::clone(&plan);
        // With --sandbox strict the threads after it fail for the same reason
        // and end the agent.
        move || drop(plan.enter(Role::Log))
    });
    plan
}

fn spawn_walker(
    config: &Config,
    plan: &Arc<Plan>,
    tracer: Option<&mut Tracer>,
) -> anyhow::Result<(Walker, WalkMessages)> {
    let options = WalkerOptions {
        all_netns: config.all_netns,
        listeners: config.listeners,
        force_proc: tracer.is_none(),
        source: tracer.and_then(socket_source),
        ..WalkerOptions::default()
    };
    let plan = Arc::clone(plan);
    Walker::spawn_after(options, move || {
        #[cfg(debug_assertions)]
        panic_if_asked("walker");
        plan.enter(Role::Walker).map(drop)
    })
    .context("cannot start the walker thread")
}

fn pipeline(
    config: &Config,
    host: NetnsId,
    attached: Attached,
    database: &Arc<Database>,
    walker: Walker,
    ready: watch::Sender<bool>,
) -> Pipeline {
    let rungs = attached.rungs();
    for rung in &rungs {
        let reason = rung.reason().map(|reason| format!(": {reason}"));
        debug!(
            "{} attached by {}{}",
            rung.probe.label(),
            rung.method.label(),
            reason.unwrap_or_default()
        );
    }
    let (source, audit_every) = match attached.tracer {
        Some(_) => (Source::Ebpf, config.reconcile_interval),
        None => (Source::Proc, config.proc_interval),
    };
    let fold = Fold::new(fold_config(config, host, attached.tracer.as_ref()));
    Pipeline::new(
        attached.tracer,
        fold,
        Locator::new(Arc::clone(database)),
        walker,
        StatusBoard::new(
            source,
            attached.degraded,
            rungs,
            database.info(0, 0),
            audit_every,
            config.demo,
            ready,
        ),
        audit_every,
        config.traffic_interval,
    )
}

type FoldEnded = oneshot::Receiver<anyhow::Result<()>>;

fn spawn_fold(
    pipeline: Pipeline,
    inputs: Inputs,
    plan: &Arc<Plan>,
) -> anyhow::Result<(JoinHandle<()>, FoldEnded)> {
    let (ended, fold_ended) = oneshot::channel();
    let plan = Arc::clone(plan);
    let run = move || {
        let runtime = runtime().context("cannot start the fold runtime")?;
        // After the runtime: its signal pipe is a socket pair.
        plan.enter(Role::Fold)?;
        runtime.block_on(pipeline.run(inputs))
    };
    let thread = std::thread::Builder::new()
        .name("connmon-fold".into())
        // Nobody is left to receive it while the process ends.
        .spawn(move || drop(ended.send(run())))
        .context("cannot start the fold thread")?;
    Ok((thread, fold_ended))
}

/// A panic in any thread ends the process: stale numbers are worse than none.
fn exit_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let message = format!("bug: {panic}; exiting rather than serving stale numbers");
        logging::last_error(module_path!(), &message);
        std::process::exit(PANIC_EXIT);
    }));
}

/// Panics in the named thread, for the tests of what a panic does.
#[cfg(debug_assertions)]
fn panic_if_asked(thread: &str) {
    if std::env::var_os("CONNMON_TEST_PANIC").is_some_and(|asked| asked == thread) {
        panic!("requested by CONNMON_TEST_PANIC");
    }
}

fn bind(config: &Config) -> anyhow::Result<Server> {
    Server::bind(&config.server_options()).map_err(|error| match error {
        ServeError::WebConfig(error) => config.refused("web.config.file", error).into(),
        ServeError::Listen(error) => error.into(),
    })
}

fn open_database(config: &Config) -> anyhow::Result<(Option<Reloader>, Database)> {
    let Some(path) = &config.geoip_database else {
        let database = Database::embedded().context("the embedded country database")?;
        return Ok((None, database));
    };
    let (reloader, database) =
        Reloader::open(path).map_err(|error| config.refused("geoip.database", error))?;
    Ok((Some(reloader), database))
}

/// The attached programs, or why there are none.
#[derive(Default)]
struct Attached {
    /// `None`: the agent polls.
    tracer: Option<Tracer>,
    /// Why it polls, unless the configuration asks for that.
    degraded: Option<String>,
    failures: Vec<AttachFailure>,
}

impl Attached {
    fn rungs(&self) -> Vec<Rung> {
        match &self.tracer {
            Some(tracer) => tracer.rungs().to_vec(),
            None => connmon_host::kernel::no_rungs(&self.failures),
        }
    }

    /// For the log; where the agent polls, a warning names the reason.
    fn not_measured(&self) -> Option<String> {
        let tracer = self.tracer.as_ref()?;
        startup::not_measured(tracer.rungs(), tracer.traffic_known())
    }
}

fn attach(config: &Config, host: NetnsId) -> anyhow::Result<Attached> {
    let mut attached = Attached::default();
    if config.source == SourceChoice::Proc {
        let asked = AttachFailure::new(Method::None, Stage::Configuration, "--source proc");
        attached.failures.push(asked);
        return Ok(attached);
    }
    let options = TracerOptions {
        attach: config.attach,
        ring_buffer_bytes: config.ring_buffer_bytes,
        drop_loopback: config.exclude_loopback,
        only_netns: (!config.all_netns).then_some(host),
        owners: false,
        traffic: true,
        log_level: config.log_level,
    };
    let error = match Tracer::attach(&options) {
        Ok(mut tracer) => {
            if config.bpf_stats
                && let Err(error) = tracer.enable_stats()
            {
                warn!(
                    "--ebpf.stats: the kernel does not time the programs ({error}): \
                     grant CAP_SYS_ADMIN, or set kernel.bpf_stats_enabled=1"
                );
            }
            attached.tracer = Some(tracer);
            return Ok(attached);
        }
        Err(error) => error,
    };
    let reason = match sandbox::missing_for_tracing() {
        Some(missing) => format!("{missing}: {error}"),
        None => error.to_string(),
    };
    if config.source == SourceChoice::Ebpf {
        anyhow::bail!("--source ebpf: {reason}");
    }
    let every = config.proc_interval;
    warn!("no eBPF, polling /proc every {every:?} instead: {reason}");
    attached.degraded = Some(reason);
    attached.failures = error.failures;
    Ok(attached)
}

fn socket_source(tracer: &mut Tracer) -> Option<SocketSource> {
    match tracer.socket_walk() {
        Ok(mut scan) => Some(Box::new(move |sink: &mut dyn FnMut(LiveSocket) -> bool| {
            scan.read(sink)
        })),
        Err(reason) => {
            debug!("initial scan by two sock_diag dumps, not by BPF: {reason}");
            None
        }
    }
}

fn fold_config(config: &Config, host: NetnsId, tracer: Option<&Tracer>) -> FoldConfig {
    FoldConfig {
        filter: RemoteFilter {
            exclude_loopback: config.exclude_loopback,
            exclude: config.exclude.clone(),
        },
        ports_allow: config.ports_allow.clone(),
        ports_max: config.ports_max,
        cross: config.cross.clone(),
        connections_max: config.connections_max,
        listeners: config.listeners,
        listeners_max: config.listeners_max,
        host_netns: host,
        hash_key: random_key(),
        traffic: tracer.is_some_and(Tracer::traffic_known),
        accepts: tracer.is_some_and(Tracer::accepts_known),
        polling: tracer.is_none(),
    }
}

/// From the kernel, through the keys of the standard library's hash maps.
fn random_key() -> [u8; 16] {
    use std::hash::{BuildHasher as _, RandomState};
    let half = || u128::from(RandomState::new().hash_one(0_u8));
    (half() << 64 | half()).to_ne_bytes()
}
