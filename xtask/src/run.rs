//! Builds the agent as the calling user and runs it as root.

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use crate::{demo, exec};

/// Where a local test listens: this machine alone.
const LISTEN: &str = "127.0.0.1:19910";

/// `cargo xtask run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Made-up traffic between namespaces of its own, with a test database
    #[arg(long)]
    demo: bool,
    /// Arguments of the agent, after `--`
    #[arg(last = true)]
    agent: Vec<OsString>,
}

/// Replaces this process by the agent.
///
/// # Errors
/// When the build fails or the agent cannot be started.
pub fn run(args: Args) -> Result<ExitCode> {
    exec::run(exec::cargo().args([
        "build",
        "--release",
        "--locked",
        "--package",
        "connmon",
        "--quiet",
    ]))?;
    let agent = exec::target_dir().join("release/connmon");
    let mut arguments = Vec::new();
    if !sets_listen_address(&args.agent) {
        arguments.extend(["--web.listen-address", LISTEN].map(OsString::from));
    }
    arguments.extend(args.agent.iter().cloned());
    if args.demo && exec::is_root() {
        return demo::run(&agent, &arguments);
    }
    // Namespaces need root as much as the agent does.
    let program = match args.demo {
        false => agent,
        true => env::current_exe().context("cannot find this program")?,
    };
    let mut command = Command::new(&program);
    if args.demo {
        command
            .arg("demo")
            .arg("--agent")
            .arg(exec::target_dir().join("release/connmon"))
            .arg("--");
    }
    command.args(&arguments);
    if !exec::is_root() {
        if exec::find("sudo").is_none() {
            println!("tracing needs root, and there is no sudo here. As root, type:");
            let variables = connmon_variables().into_iter().filter_map(|name| {
                let value = env::var(&name).ok()?;
                Some(format!("{name}={} ", exec::quoted(&value)))
            });
            println!(
                "  {}{}",
                variables.collect::<String>(),
                exec::shown(&command)
            );
            return Ok(ExitCode::FAILURE);
        }
        command = through_sudo(&command);
    }
    // Only comes back when it fails.
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start `{}`", exec::shown(&command)))
}

/// The same command as root, our settings kept.
fn through_sudo(command: &Command) -> Command {
    let mut sudo = Command::new("sudo");
    let kept = connmon_variables().join(",");
    if !kept.is_empty() {
        sudo.arg(format!("--preserve-env={kept}"));
    }
    sudo.arg("--")
        .arg(command.get_program())
        .args(command.get_args());
    sudo
}

/// `cargo xtask demo`: the part of `run --demo` that is root's.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// The agent's binary
    #[arg(long)]
    agent: PathBuf,
    /// Arguments of the agent
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// Runs the demo with an agent that is built already.
///
/// # Errors
/// See [`demo::run`].
pub fn run_demo(args: &DemoArgs) -> Result<ExitCode> {
    demo::run(&args.agent, &args.arguments)
}

/// Settings of the agent in our environment.
fn connmon_variables() -> Vec<String> {
    env::vars_os()
        .filter_map(|(name, _)| name.into_string().ok())
        .filter(|name| name.starts_with("CONNMON_"))
        .collect()
}

/// Whether the caller decides where to listen, by flag, variable or file.
fn sets_listen_address(args: &[OsString]) -> bool {
    let address = "web.listen-address";
    if flag(args, address).is_some() || env::var_os("CONNMON_WEB_LISTEN_ADDRESS").is_some() {
        return true;
    }
    let file = flag(args, "config.file").or_else(|| env::var_os("CONNMON_CONFIG_FILE"));
    // A file that we cannot read does not open the port to the network.
    let text = file.and_then(|file| std::fs::read_to_string(file).ok());
    text.is_some_and(|text| {
        text.lines().any(|line| {
            let (key, _) = line.split_once(':').unwrap_or_default();
            key.trim().trim_matches(['"', '\'']) == address
        })
    })
}

/// The value of a flag, as `--name VALUE` or `--name=VALUE`.
fn flag(args: &[OsString], name: &str) -> Option<OsString> {
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let rest = arg
            .to_str()
            .and_then(|arg| arg.strip_prefix("--")?.strip_prefix(name));
        match rest {
            Some("") => return Some(args.next().cloned().unwrap_or_default()),
            Some(rest) => {
                if let Some(value) = rest.strip_prefix('=') {
                    return Some(value.into());
                }
            }
            None => {}
        }
    }
    None
}
