//! Parses the command line, runs the command, maps the result to an exit code.

use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::Parser;
use connmon::cli::{self, Cli, Command};
use connmon::config::{self, ConfigError, Loaded, LogFormat};
use connmon::{agent, cmd, logging, version};
use connmon_core::text;

/// Wrong usage or bad configuration; clap uses the same.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let words = cli::normalize(std::env::args_os());
    let environment: Vec<(OsString, OsString)> = std::env::vars_os().collect();
    let refused_format = || config::log_format(&words, &environment);
    let cli = match Cli::try_parse_from(&words) {
        Ok(cli) => cli,
        Err(error) => {
            if error.use_stderr() && refused_format() == LogFormat::Json {
                let text = error.to_string();
                // Without the usage that follows.
                let problem = text.split("\n\n").next().unwrap_or_default();
                logging::last_line(LogFormat::Json, problem.trim_start_matches("error: "));
            } else {
                // A closed pipe is no failure.
                let _ = error.print();
            }
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    if cli.version {
        let written = std::io::stdout().write_all(version::text().as_bytes());
        return finish(
            LogFormat::Logfmt,
            written.map(|()| ExitCode::SUCCESS).map_err(Into::into),
        );
    }
    match config::load(&cli.typed(), environment.iter().cloned()) {
        Ok(loaded) => {
            let is_dumb =
                std::env::var_os("TERM").is_some_and(|term| term == "dumb" || term == "unknown");
            finish(loaded.config.log_format, run(cli, loaded, is_dumb))
        }
        Err(error) => finish(refused_format(), Err(error.into())),
    }
}

/// Result → last line and exit code.
fn finish(format: LogFormat, result: anyhow::Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => {
            log::logger().flush();
            code
        }
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            logging::last_line(format, &format!("{error:#}"));
            match error.downcast_ref::<ConfigError>() {
                Some(error) if !error.is_not_yet() => ExitCode::from(USAGE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Runs the command; `is_dumb` for a terminal without escape sequences.
fn run(cli: Cli, loaded: Loaded, is_dumb: bool) -> anyhow::Result<ExitCode> {
    let unknown = &loaded.unknown_variables;
    if loaded.config.check_only {
        let mut remarks = config::check(&loaded)?;
        let warned = unknown
            .iter()
            .filter(|(level, _)| *level == log::Level::Warn);
        remarks.extend(warned.map(|(_, message)| message.clone()));
        for remark in remarks {
            let _ = writeln!(std::io::stderr(), "connmon: {}", text::printable(remark));
        }
        std::io::stdout().write_all(b"the configuration is valid\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    logging::init(loaded.config.log_level, loaded.config.log_format);
    for (level, message) in unknown {
        log::log!(*level, "{message}");
    }
    let config = loaded.config;
    let done = |()| ExitCode::SUCCESS;
    match cli.command {
        None | Some(Command::Run { .. }) => agent::run(config).map(done),
        Some(Command::Check(args)) => cmd::check::run(&config, args.output),
        Some(Command::Trace(args)) => cmd::trace::run(&config, &args).map(done),
        Some(Command::List(args)) => cmd::list::run(&config, &args).map(done),
        Some(Command::Top { .. }) => cmd::top::run(&config, is_dumb).map(done),
    }
}

/// Whether the reader of our output has closed it.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let error = cause.downcast_ref::<std::io::Error>();
        error.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    })
}
