//! Parse, run, exit code.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::Parser;
use connmon::cli::{self, Cli, Command};
use connmon::config::{self, ConfigError, Loaded};
use connmon::{agent, cmd, logging, version};

/// Wrong usage or bad configuration; clap uses the same.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(cli::normalize(std::env::args_os())) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to stdout and is no failure; a closed pipe is no news.
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    match run(cli) {
        Ok(code) => {
            log::logger().flush();
            code
        }
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            logging::last_line(format!("connmon: {error:#}\n"));
            match error.downcast_ref::<ConfigError>() {
                Some(_) => ExitCode::from(USAGE),
                None => ExitCode::FAILURE,
            }
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    if cli.version {
        std::io::stdout().write_all(version::text().as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    let loaded = config::load(&cli.typed(), std::env::vars_os())?;
    if loaded.check_only {
        config::check(&loaded)?;
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
        Some(Command::Top(args)) => cmd::top::run(config, args).map(done),
    }
}

/// Whoever read our output has enough of it.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    })
}
