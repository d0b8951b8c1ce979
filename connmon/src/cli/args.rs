//! Arguments of `check`, `trace` and `list`.

use std::time::Duration;

use clap::{Args, ValueEnum};
use connmon_core::fold::Direction;
use connmon_core::geo::Country;

use crate::config::parse;

use super::{AgentFlags, ToolFlags};

/// `-o`, `--output`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// One object a line.
    Json,
}

/// `trace --event`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EventKind {
    /// A handshake completed.
    Open,
    /// A connection reached CLOSE.
    Close,
    /// An active open never completed.
    Fail,
}

/// `list --by`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum By {
    /// One line a connection.
    #[default]
    Connection,
    /// One line a country.
    Country,
    /// One line a service port and direction.
    Port,
    /// One line a process.
    Process,
}

/// `connmon check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Output format
    #[arg(long, short, value_enum, ignore_case = true, default_value_t)]
    pub output: Output,
    /// The settings of the agent that is to run here.
    #[command(flatten)]
    pub flags: AgentFlags,
}

/// `connmon trace`. Filters of one kind are alternatives, kinds combine.
#[derive(Debug, Args)]
pub struct TraceArgs {
    /// Output format
    #[arg(long, short, value_enum, ignore_case = true, default_value_t)]
    pub output: Output,
    /// Only this country (ISO code, private, loopback or unknown), repeatable
    #[arg(long, value_name = "CC", value_delimiter = ',', value_parser = country)]
    pub country: Vec<Country>,
    /// Only this service port, repeatable
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Vec<u16>,
    /// Only this process id, repeatable
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Vec<u32>,
    /// Only this process name, repeatable
    #[arg(long, value_name = "NAME")]
    pub process: Vec<String>,
    /// Only this direction: inbound or outbound
    #[arg(long, value_parser = parse::choice(DIRECTIONS))]
    pub direction: Option<Direction>,
    /// Only this kind of event, repeatable
    #[arg(long, value_enum, ignore_case = true, value_delimiter = ',')]
    pub event: Vec<EventKind>,
    /// Stop after this time: seconds, or a duration like 1m30s
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub duration: Option<Duration>,
    /// Stop after this many events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Agent settings.
    #[command(flatten)]
    pub flags: ToolFlags,
}

/// `connmon list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Output format
    #[arg(long, short, value_enum, ignore_case = true, default_value_t)]
    pub output: Output,
    /// What a line is
    #[arg(long, value_enum, ignore_case = true, default_value_t)]
    pub by: By,
    /// Agent settings.
    #[command(flatten)]
    pub flags: ToolFlags,
}

fn country(text: &str) -> Result<Country, String> {
    match text.to_ascii_lowercase().as_str() {
        "private" => Ok(Country::PRIVATE),
        "loopback" => Ok(Country::LOOPBACK),
        "unknown" => Ok(Country::UNKNOWN),
        _ => Some(Country::from_code(text))
            .filter(|country| country.is_public())
            .ok_or_else(|| {
                "must be an ISO 3166-1 alpha-2 code, private, loopback or unknown".to_owned()
            }),
    }
}

const DIRECTIONS: &[(&str, Direction)] = &[
    ("inbound", Direction::Inbound),
    ("outbound", Direction::Outbound),
];

/// Seconds, fractions allowed, or a Prometheus duration; more than zero, at
/// most [`LONGEST`].
fn seconds(text: &str) -> Result<Duration, String> {
    let value = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Err(_) => Some(connmon_http::duration(text)?),
    };
    value
        .filter(|value| !value.is_zero() && *value <= LONGEST)
        .ok_or_else(|| format!("bad duration {text:?}: must be more than 0 and at most 100y"))
}

/// Longest time to run: counted from now it still ends at an `Instant`.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);
