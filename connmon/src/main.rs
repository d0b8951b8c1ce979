//! Parse, run, exit code.

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
    let cli = match Cli::try_parse_from(&words) {
        Ok(cli) => cli,
        Err(error) => {
            let typed = cli::typed_among(&words);
            match config::log_format(&typed, &environment) {
                LogFormat::Json if error.use_stderr() => {
                    let text = error.to_string();
                    // Without the usage that follows.
                    let problem = text.split("\n\n").next().unwrap_or_default();
                    logging::last_line(LogFormat::Json, problem.trim_start_matches("error: "));
                }
                // Help goes to stdout and is no failure; a closed pipe is no
                // failure either.
                _ => drop(error.print()),
            }
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    if cli.version {
        return finish(LogFormat::Logfmt, print_version());
    }
    let typed = cli.typed();
    match config::load(&typed, environment.iter().cloned()) {
        Ok(loaded) => finish(
            loaded.config.log_format,
            run(cli, loaded, is_dumb(&environment)),
        ),
        Err(error) => finish(config::log_format(&typed, &environment), Err(error.into())),
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

fn print_version() -> anyhow::Result<ExitCode> {
    std::io::stdout().write_all(version::text().as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn run(cli: Cli, loaded: Loaded, is_dumb: bool) -> anyhow::Result<ExitCode> {
    if loaded.check_only {
        for remark in config::check(&loaded)? {
            let _ = writeln!(std::io::stderr(), "connmon: {}", text::printable(remark));
        }
        std::io::stdout().write_all(b"configuration is good\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    let Loaded {
        config,
        unknown_variables,
        ..
    } = loaded;
    logging::init(config.log_level, config.log_format);
    for name in unknown_variables {
        log::debug!("environment variable {name} names no setting and is ignored");
    }
    let done = |()| ExitCode::SUCCESS;
    match cli.command {
        None | Some(Command::Run { .. }) => agent::run(config).map(done),
        Some(Command::Check(args)) => cmd::check::run(&config, args.output),
        Some(Command::Trace(args)) => cmd::trace::run(config, args).map(done),
        Some(Command::List(args)) => cmd::list::run(config, args).map(done),
        Some(Command::Top(args)) => cmd::top::run(config, args, is_dumb).map(done),
    }
}

/// Whether the terminal knows no escape sequences.
fn is_dumb(environment: &[(OsString, OsString)]) -> bool {
    environment
        .iter()
        .any(|(name, value)| name == "TERM" && (value == "dumb" || value == "unknown"))
}

/// Whoever read our output has enough of it.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    })
}
