//! The only wiring: threads, channels and shutdown of the agent.
//!
//! Three threads: the walker (reconcile), the fold (ring, state) and this
//! one (HTTP, signals, files). They share nothing but channels. A fourth
//! writes what they log.

mod content;
mod first_words;
mod pipeline;
mod reporter;
mod schedule;
mod serve;
mod status;

use std::io;
use std::sync::Arc;

use anyhow::Context as _;
use connmon_core::event::{LiveSocket, NetnsId};
use connmon_core::fold::{Fold, FoldConfig, RemoteFilter};
use connmon_core::geo::{Database, Locator};
use connmon_core::probe::{AttachFailure, Method, Stage};
use connmon_core::report::Source;
use connmon_host::kernel::{Tracer, TracerOptions};
use connmon_host::reconcile::netns::Roots;
use connmon_host::reconcile::{SocketSource, Walker, WalkerOptions};
use connmon_host::sandbox::{self, Plan};
use connmon_http::{ServeError, Server};
use log::warn;
use tokio::sync::{mpsc, oneshot, watch};

use crate::config::{Config, SourceChoice};
use crate::database::Reloader;
use crate::logging;
use crate::notify::Notify;

use content::AgentContent;
use pipeline::Parts;
use serve::{DatabaseWatch, Serving, Signals};
use status::StatusBoard;

/// What the exit code is when a thread panicked; Rust's own.
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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the serving runtime")?;
    // Before anything that takes its time, so that a signal then ends the
    // agent as cleanly as later.
    let signals = {
        let _runtime = runtime.enter();
        Signals::new()?
    };
    let (reloader, database) = open_database(&config)?;
    let server = bind(&config)?;
    let host = Roots::default()
        .host()
        .context("cannot read /proc/self/ns/net; is /proc mounted?")?;
    let attached = attach(&config, host)?;
    let mut tracer = attached.tracer;
    let source = if tracer.is_some() {
        Source::Ebpf
    } else {
        Source::Proc
    };
    let traffic = tracer.as_ref().is_some_and(Tracer::traffic_known);
    // Every thread closes itself in, once what it needs is open.
    let mut plan = config.sandbox_plan();
    for file in server.files() {
        plan.also_readable(file);
    }
    let plan = Arc::new(plan);
    logging::enter_sandbox({
        let plan = Arc::clone(&plan);
        // With --sandbox strict what is missing here ends the others, which
        // are to have the same and more.
        move || drop(plan.enter_log())
    });
    let (walker, messages) = Walker::spawn_after(
        WalkerOptions {
            all_netns: config.all_netns,
            listeners: config.listeners,
            force_proc: source == Source::Proc,
            source: tracer.as_mut().and_then(socket_source),
            ..WalkerOptions::default()
        },
        {
            let plan = Arc::clone(&plan);
            move || {
                #[cfg(debug_assertions)]
                panic_if_asked("walker");
                plan.enter_walker().map(drop).map_err(io::Error::other)
            }
        },
    )
    .context("cannot start the reconcile thread")?;
    if let Some(tracer) = &mut tracer {
        tracer.close_maps();
    }

    let (reporter, requests) = reporter::channel();
    let (databases, new_databases) = mpsc::channel(1);
    let (stop, stopping) = watch::channel(false);
    let (ready, is_ready) = watch::channel(false);
    let (ended, fold_ended) = oneshot::channel();
    let audit_every = match source {
        Source::Ebpf => config.reconcile_interval,
        Source::Proc => config.proc_interval,
    };
    let rungs = match &tracer {
        Some(tracer) => tracer.rungs().to_vec(),
        None => connmon_host::kernel::no_rungs(&attached.failures),
    };
    status::log_rungs(&rungs);
    let database = Arc::new(database);
    let board = StatusBoard::new(
        source,
        attached.degraded,
        rungs,
        database.info(0, 0),
        audit_every,
        config.demo,
        ready,
    );
    let parts = Parts {
        fold: Fold::new(fold_config(&config, host, tracer.as_ref(), traffic)),
        tracer,
        locator: Locator::new(Arc::clone(&database)),
        walker,
        messages,
        requests,
        databases: new_databases,
        shutdown: stopping.clone(),
        board,
        audit_every,
        traffic,
        traffic_every: config.traffic_interval.filter(|_| traffic),
    };
    let fold_thread = std::thread::Builder::new()
        .name("connmon-fold".into())
        .spawn({
            let plan = Arc::clone(&plan);
            move || {
                // Nobody left to tell when the receiver is gone.
                let _ = ended.send(run_fold(parts, &plan));
            }
        })
        .context("cannot start the fold thread")?;

    let url = server.url();
    let serving = {
        let _runtime = runtime.enter();
        Serving {
            server,
            content: AgentContent::new(&config),
            reporter,
            page: url.map(|url| page_words(&url, &config)),
            ready: is_ready,
            fold_ended,
            stop,
            signals,
            database: DatabaseWatch::new(reloader, database, databases),
            notify: Notify::from_env(),
        }
    };
    let result = runtime.block_on(serve::run(serving, &plan));
    // A database under check or a password under test is not waited for.
    runtime.shutdown_background();
    // The fold thread has been told to stop; on errors the process ends anyway.
    if result.is_ok() {
        drop(fold_thread.join());
    }
    result
}

/// The second line a person sees.
fn page_words(url: &str, config: &Config) -> String {
    let telemetry = config.telemetry_path.trim_start_matches('/');
    let demo = if config.demo { " of a demo" } else { "" };
    format!("{url} shows the map{demo}, {url}{telemetry} the metrics")
}

fn run_fold(parts: Parts, plan: &Plan) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the fold runtime")?;
    // After the runtime: its signal pipe is a socket pair.
    plan.enter_fold()?;
    runtime.block_on(pipeline::run(parts))
}

/// A panic in any thread ends the process: stale numbers are worse than none.
fn exit_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let message = format!("bug: {panic}; exiting rather than serving stale numbers");
        logging::last_error(module_path!(), &message);
        std::process::exit(PANIC_EXIT);
    }));
}

/// Stands in for a bug in the tests of what a panic does.
#[cfg(debug_assertions)]
fn panic_if_asked(room: &str) {
    if std::env::var_os("CONNMON_TEST_PANIC").is_some_and(|asked| asked == room) {
        panic!("asked for by CONNMON_TEST_PANIC");
    }
}

fn bind(config: &Config) -> anyhow::Result<Server> {
    Server::bind(&config.server_options()).map_err(|error| match error {
        ServeError::WebConfig(error) => config.refused("web.config.file", error).into(),
        ServeError::Address(error) => error.into(),
        ServeError::Bind(error) => error.into(),
    })
}

fn open_database(config: &Config) -> anyhow::Result<(Option<Reloader>, Database)> {
    Ok(match &config.geoip_database {
        None => (
            None,
            Database::embedded().context("the embedded country database")?,
        ),
        Some(path) => {
            let (reloader, database) =
                Reloader::open(path).map_err(|error| config.refused("geoip.database", error))?;
            (Some(reloader), database)
        }
    })
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

fn attach(config: &Config, host: NetnsId) -> anyhow::Result<Attached> {
    if config.source == SourceChoice::Proc {
        let asked = AttachFailure::new(Method::None, Stage::Configuration, "--source proc");
        return Ok(Attached {
            failures: vec![asked],
            ..Attached::default()
        });
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
    match Tracer::attach(&options) {
        Ok(mut tracer) => {
            if config.bpf_stats
                && let Err(error) = tracer.enable_stats()
            {
                warn!(
                    "--ebpf.stats: the kernel does not time the programs ({error}): \
                     grant CAP_SYS_ADMIN, or set kernel.bpf_stats_enabled=1"
                );
            }
            Ok(Attached {
                tracer: Some(tracer),
                ..Attached::default()
            })
        }
        Err(error) => {
            let reason = match sandbox::missing_for_tracing() {
                Some(missing) => format!("{missing}: {error}"),
                None => error.to_string(),
            };
            if config.source == SourceChoice::Ebpf {
                anyhow::bail!("--source ebpf: {reason}");
            }
            warn!(
                "no eBPF, polling /proc every {:?} instead: {reason}",
                config.proc_interval
            );
            Ok(Attached {
                tracer: None,
                degraded: Some(reason),
                failures: error.failures,
            })
        }
    }
}

fn socket_source(tracer: &mut Tracer) -> Option<Box<dyn SocketSource>> {
    match tracer.socket_walk() {
        Ok(mut scan) => Some(Box::new(move |sink: &mut dyn FnMut(LiveSocket) -> bool| {
            scan.read(sink)
        })),
        Err(reason) => {
            log::debug!("the first walk is two dumps: {reason}");
            None
        }
    }
}

fn fold_config(
    config: &Config,
    host: NetnsId,
    tracer: Option<&Tracer>,
    traffic: bool,
) -> FoldConfig {
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
        traffic,
        accepts: tracer.is_some_and(Tracer::accepts_known),
        polling: tracer.is_none(),
    }
}

/// From the kernel by way of the standard library's hash keys.
fn random_key() -> [u8; 16] {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let word = || RandomState::new().build_hasher().finish().to_ne_bytes();
    let (first, second) = (word(), word());
    std::array::from_fn(|at| if at < 8 { first[at] } else { second[at - 8] })
}
