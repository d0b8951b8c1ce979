//! The command line: commands and what was typed. [`crate::config`] turns
//! the agent's settings into what the program needs.

mod args;
mod normalize;

pub use args::{By, CheckArgs, EventKind, ListArgs, Output, TraceArgs};
pub use normalize::normalize;

use clap::builder::Resettable;
use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, Parser, Subcommand, value_parser};

use crate::config;

/// Traces this machine's TCP connections and serves Prometheus metrics about
/// them, by country and by port.
///
/// Every agent flag is also an environment variable (--ports.max is
/// CONNMON_PORTS_MAX) and a key of --config.file; flags beat variables beat
/// the file.
#[derive(Debug, Parser)]
#[command(
    name = "connmon",
    disable_version_flag = true,
    disable_help_subcommand = true,
    max_term_width = 100
)]
pub struct Cli {
    /// Agent flags before or without a command.
    #[command(flatten)]
    pub flags: AgentFlags,
    /// Print version information and exit.
    #[arg(long, short = 'V', action = ArgAction::SetTrue, global = true)]
    pub version: bool,
    /// What to do; nothing is `run`.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Trace, count and serve metrics until SIGTERM (the default)
    Run {
        /// Agent flags.
        #[command(flatten)]
        flags: AgentFlags,
    },
    /// Show what works on this host, and what helps where something does not
    Check(CheckArgs),
    /// Print connection events as they happen
    Trace(TraceArgs),
    /// Print what is connected now
    List(ListArgs),
    /// Show what is connected now, refreshing
    Top {
        /// Agent settings.
        #[command(flatten)]
        flags: ToolFlags,
    },
}

impl Cli {
    /// All settings typed, in order; a command's own beat those before it.
    pub fn typed(&self) -> Vec<(&'static str, String)> {
        let own = match &self.command {
            None => &[][..],
            Some(Command::Run { flags }) => &flags.0,
            Some(Command::Check(args)) => &args.flags.0,
            Some(Command::Trace(args)) => &args.flags.0,
            Some(Command::List(args)) => &args.flags.0,
            Some(Command::Top { flags }) => &flags.0,
        };
        self.flags.0.iter().chain(own).cloned().collect()
    }
}

/// Settings that `trace`, `list` and `top` take.
const TOOL_SETTINGS: [&str; 11] = [
    "config.file",
    "source",
    "ebpf.attach",
    "ebpf.ring-buffer-size",
    "geoip.database",
    "filter.loopback",
    "filter.exclude",
    "netns",
    "sandbox",
    "log.level",
    "log.format",
];

/// Settings as typed, key and text: those in `TOOL_SETTINGS`, or all.
/// [`crate::config`] validates them.
#[derive(Clone, Debug, Default)]
pub struct Typed<const TOOL: bool>(Vec<(&'static str, String)>);

/// Every setting of the agent.
pub type AgentFlags = Typed<false>;

/// The settings that matter to `trace`, `list` and `top`.
pub type ToolFlags = Typed<true>;

impl<const TOOL: bool> Typed<TOOL> {
    fn settings() -> impl Iterator<Item = &'static Arg> {
        let settings = config::settings().iter();
        settings.filter(|setting| !TOOL || TOOL_SETTINGS.contains(&config::key(setting)))
    }
}

impl<const TOOL: bool> FromArgMatches for Typed<TOOL> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let texts = |setting: &'static Arg| {
            let texts = matches.get_many::<String>(setting.get_id().as_str());
            let key = config::key(setting);
            texts
                .unwrap_or_default()
                .map(move |text| (key, text.clone()))
        };
        Ok(Self(Self::settings().flat_map(texts).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<const TOOL: bool> Args for Typed<TOOL> {
    fn augment_args(command: clap::Command) -> clap::Command {
        command.args(Self::settings().map(|setting| {
            let default = setting.get_default_values().first();
            let default = default.filter(|_| !setting.is_hide_default_value_set());
            let mut help = setting
                .get_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            if let Some(default) = default {
                // Behind the help text; clap would give it a paragraph.
                help += &format!(" [default: {}]", default.display());
            }
            let typed = setting
                .clone()
                .value_parser(value_parser!(String))
                .help(help);
            typed.default_value(Resettable::Reset)
        }))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use connmon_core::fold::Direction;
    use connmon_core::geo::Country;

    fn parsed(line: &str) -> Result<Cli, clap::Error> {
        let words = line.split_whitespace().map(std::ffi::OsString::from);
        Cli::try_parse_from(normalize(words))
    }

    #[test]
    fn the_table_is_a_valid_command() {
        <Cli as clap::CommandFactory>::command().debug_assert();
        assert_eq!(ToolFlags::settings().count(), TOOL_SETTINGS.len());
    }

    #[test]
    fn long_flags_take_one_dash_or_two() {
        for line in [
            "connmon --web.listen-address=:1 --web.listen-address :2 --ebpf.stats --config.check=false",
            "connmon -web.listen-address=:1 -web.listen-address :2 -ebpf.stats -config.check=false",
            "connmon run -web.listen-address :1 --web.listen-address=:2 -ebpf.stats -config.check=false",
            "connmon -web.listen-address :1 run --web.listen-address=:2 --ebpf.stats -config.check=false",
        ] {
            let typed = parsed(line).unwrap().typed();
            for pair in [
                ("web.listen-address", ":1"),
                ("web.listen-address", ":2"),
                ("ebpf.stats", "true"),
                ("config.check", "false"),
            ] {
                let pair = (pair.0, pair.1.to_owned());
                assert!(typed.contains(&pair), "{line}: {typed:?}");
            }
        }
        assert!(parsed("connmon -version").unwrap().version);
        assert!(parsed("connmon --version").unwrap().version);
        for command in ["run", "check", "trace", "list", "top"] {
            assert!(
                parsed(&format!("connmon {command} --version"))
                    .unwrap()
                    .version
            );
        }
    }

    #[test]
    fn commands_have_typed_arguments() {
        let Some(Command::Trace(args)) = parsed(
            "connmon trace -o json --country de --country private,US --port 443 --port 80,22 --pid 1 \
             --process curl --direction inbound --event open --event fail --duration 1m30s --count 7",
        )
        .unwrap()
        .command
        else {
            panic!("not trace");
        };
        assert_eq!(args.output, Output::Json);
        assert_eq!(
            args.country,
            [
                Country::from_code("DE"),
                Country::PRIVATE,
                Country::from_code("US")
            ]
        );
        assert_eq!(args.port, [443, 80, 22]);
        assert_eq!(
            (args.pid.as_slice(), args.process.as_slice()),
            (&[1][..], &["curl".to_owned()][..])
        );
        assert_eq!(args.direction, Some(Direction::Inbound));
        assert_eq!(args.event, [EventKind::Open, EventKind::Fail]);
        assert_eq!(
            (args.duration, args.count),
            (Some(Duration::from_secs(90)), Some(7))
        );

        let Some(Command::List(args)) = parsed("connmon list --by country").unwrap().command else {
            panic!("not list");
        };
        assert_eq!((args.by, args.output), (By::Country, Output::Table));
        let Some(Command::Trace(args)) = parsed("connmon trace --duration 2.5").unwrap().command
        else {
            panic!("not trace");
        };
        assert_eq!(args.duration, Some(Duration::from_millis(2_500)));
        assert!(parsed("connmon trace --duration 100y").is_ok());
        for line in [
            "connmon list -o JSON --by Port",
            "connmon trace --event OPEN,Close --direction Inbound --country PRIVATE",
            "connmon check --output Table",
        ] {
            assert!(parsed(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            "connmon --banana",
            "connmon banana",
            "connmon --ports.max 1 --ports.max 2",
            "connmon --ports.max",
            "connmon trace --web.listen-address :1",
            "connmon trace --country QQ",
            "connmon trace --port 0",
            "connmon trace --port 65536",
            "connmon trace --direction sideways",
            "connmon trace --event listen",
            "connmon trace --duration x",
            "connmon trace --duration 0",
            "connmon trace --duration nan",
            "connmon trace --duration 1e19",
            "connmon trace --duration 1e20",
            "connmon trace --duration 101y",
            "connmon trace --count 0",
            "connmon list --by pid",
            "connmon check -o xml",
            "connmon --ebpf.stats true",
        ] {
            let error = parsed(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
