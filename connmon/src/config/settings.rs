//! The one table of settings. Flags, environment variables, file keys and
//! the help text all come from it.

/// How a setting is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One value.
    Value,
    /// Repeatable flag, comma-separated variable, list in the file.
    List,
    /// One value that is itself a comma-separated list; the file may also
    /// write it as a YAML list.
    Joined,
    /// On by being named; `=true` and `=false` are understood.
    Switch,
}

/// One setting of the agent.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Flag without its dashes, and key in the file.
    pub key: &'static str,
    /// How it is written.
    pub kind: Kind,
    /// Placeholder in the help text.
    pub placeholder: &'static str,
    /// Default as text; empty when there is none.
    pub default: &'static str,
    /// Meaning, one line.
    pub help: &'static str,
}

impl Setting {
    /// The environment variable: `web.listen-address` is
    /// `CONNMON_WEB_LISTEN_ADDRESS`.
    pub fn variable(&self) -> String {
        let mut name = String::from(VARIABLE_PREFIX);
        for c in self.key.chars() {
            name.push(match c {
                '.' | '-' => '_',
                c => c.to_ascii_uppercase(),
            });
        }
        name
    }

    /// The setting of that key.
    pub fn find(key: &str) -> Option<&'static Self> {
        SETTINGS.iter().find(|setting| setting.key == key)
    }
}

/// What all of connmon's environment variables start with.
pub const VARIABLE_PREFIX: &str = "CONNMON_";

const fn value(
    key: &'static str,
    placeholder: &'static str,
    default: &'static str,
    help: &'static str,
) -> Setting {
    Setting {
        key,
        kind: Kind::Value,
        placeholder,
        default,
        help,
    }
}

const fn with_kind(kind: Kind, setting: Setting) -> Setting {
    Setting { kind, ..setting }
}

/// Every setting, in the order of the help text.
pub const SETTINGS: &[Setting] = &[
    value(
        "config.file",
        "PATH",
        "",
        "YAML file with any of these settings as flat dotted keys",
    ),
    with_kind(
        Kind::Switch,
        value(
            "config.check",
            "BOOL",
            "false",
            "Validate the whole configuration, then exit: 0 good, 2 wrong, 1 names what is not there yet",
        ),
    ),
    with_kind(
        Kind::List,
        value(
            "web.listen-address",
            "ADDR",
            ":19910",
            "Address to listen on, repeatable; an empty host is dual stack, [fe80::1%eth0]:19910 names an interface",
        ),
    ),
    value(
        "web.telemetry-path",
        "PATH",
        "/metrics",
        "Path under which metrics are served",
    ),
    value(
        "web.config.file",
        "PATH",
        "",
        "TLS, basic authentication and headers, as in the Prometheus exporter-toolkit",
    ),
    value(
        "web.max-requests",
        "N",
        "40",
        "Most scrapes in flight, more get 503; 0 is no limit",
    ),
    value(
        "source",
        "auto|ebpf|proc",
        "auto",
        "Where connections come from; auto falls back to polling and says why",
    ),
    value(
        "proc.interval",
        "DURATION",
        "5s",
        "How often polling mode reads the kernel's tables",
    ),
    value(
        "ebpf.attach",
        "auto|fentry|kprobe|tracepoint",
        "auto",
        "Rung for the function probes; tracepoint uses none",
    ),
    value(
        "ebpf.ring-buffer-size",
        "BYTES",
        "8388608",
        "Size of the event ring, rounded up to a power-of-two number of pages",
    ),
    with_kind(
        Kind::Switch,
        value(
            "ebpf.stats",
            "BOOL",
            "false",
            "Have the kernel time the programs (CAP_SYS_ADMIN)",
        ),
    ),
    value(
        "geoip.database",
        "PATH",
        "",
        "Country database (MMDB), reloaded when it changes; without it the embedded DB-IP Lite",
    ),
    value(
        "filter.loopback",
        "exclude|include",
        "exclude",
        "Loopback: 127.0.0.0/8, ::1, or local address = remote address",
    ),
    with_kind(
        Kind::List,
        value(
            "filter.exclude",
            "CIDR",
            "",
            "Remote network that is not counted, repeatable",
        ),
    ),
    with_kind(
        Kind::Joined,
        value(
            "ports.allow",
            "LIST",
            "all",
            "Ports that may have series, e.g. 22,80,443,8000-8100; the rest count as other",
        ),
    ),
    value(
        "ports.max",
        "N",
        "128",
        "Most distinct port values per direction; the rest count as other",
    ),
    value(
        "connections.max",
        "N",
        "1048576",
        "Most connections tracked at once",
    ),
    value("listeners", "on|off", "on", "Listening-port inventory"),
    value(
        "listeners.max",
        "N",
        "512",
        "Most entries of the listening-port inventory",
    ),
    with_kind(
        Kind::Joined,
        value(
            "metrics.country-port",
            "off|all|LIST",
            "off",
            "Country by port families, for all or the listed ports",
        ),
    ),
    value(
        "reconcile.interval",
        "DURATION",
        "60s",
        "Audit against the kernel's own tables; stretched to stay under 0.5 % of a core",
    ),
    value(
        "traffic.interval",
        "DURATION",
        "15s",
        "Sampling of live connections' bytes; 0 switches it off",
    ),
    value(
        "netns",
        "all|host",
        "all",
        "Network namespaces that are watched",
    ),
    value(
        "sandbox",
        "auto|strict|off",
        "auto",
        "Drop what the agent does not need once it runs; strict fails where that is impossible",
    ),
    value(
        "log.level",
        "LEVEL",
        "info",
        "Lowest level logged: error, warn, info, debug or trace",
    ),
    value("log.format", "logfmt|json", "logfmt", "Format of log lines"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_follow_the_keys() {
        let setting = Setting::find("web.listen-address").unwrap();
        assert_eq!(setting.variable(), "CONNMON_WEB_LISTEN_ADDRESS");
        assert!(Setting::find("web.listen_address").is_none());
    }

    #[test]
    fn keys_and_variables_are_distinct() {
        let mut names: Vec<String> = SETTINGS.iter().map(Setting::variable).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), SETTINGS.len());
    }
}
