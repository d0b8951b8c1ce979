//! The one table of metric names, with their types, labels and help texts.

/// Type of a family, as in the exposition format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only rises.
    Counter,
    /// Rises and falls.
    Gauge,
    /// Count and sum, without quantiles.
    Summary,
    /// Cumulative buckets.
    Histogram,
}

/// One metric family.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// Name, as scraped.
    pub name: &'static str,
    /// Type.
    pub kind: Kind,
    /// Label names, in the order written.
    pub labels: &'static [&'static str],
    /// Help text.
    pub help: &'static str,
}

/// Declares the identifiers and the table behind them in one list, so that
/// neither can miss what the other has.
macro_rules! families {
    ($($id:ident $kind:ident $name:literal [$($label:literal),*] $help:literal;)+) => {
        /// A family, as index into [`FAMILIES`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Id {
            $(#[doc = concat!("`", $name, "`")] $id,)+
        }

        /// Every family, sorted by name, which is the order of a scrape.
        pub static FAMILIES: &[Family] = &[
            $(Family {
                name: $name,
                kind: Kind::$kind,
                labels: &[$($label),*],
                help: $help,
            },)+
        ];
    };
}

families! {
    AcceptQueueLength Gauge "connmon_accept_queue_length" ["netns", "address", "port"]
        "Connections waiting for accept() at the last audit, summed over the sockets that share namespace, address and port.";
    AcceptQueueLimit Gauge "connmon_accept_queue_limit" ["netns", "address", "port"]
        "Longest accept queue allowed (listen() backlog), summed over the sockets that share namespace, address and port.";
    AcceptWait Histogram "connmon_accept_wait_seconds" []
        "Time from the end of a passive handshake to accept() returning the connection.";
    BpfProgramRunSeconds Counter "connmon_bpf_program_run_seconds_total" ["program"]
        "Time the kernel spent in a BPF program.";
    BpfProgramRuns Counter "connmon_bpf_program_runs_total" ["program"]
        "Runs of a BPF program.";
    BuildInfo Gauge "connmon_build_info" ["version", "revision", "branch", "rustversion", "target"]
        "Constant 1, labelled with what this connmon was built from.";
    ConnectLatency Histogram "connmon_connect_latency_seconds" []
        "Time active opens took from SYN to ESTABLISHED.";
    ConnectionDuration Histogram "connmon_connection_duration_seconds" ["direction"]
        "Time from the end of the handshake to CLOSE, of connections opened since start.";
    CountryConnectFailures Counter "connmon_country_connect_failures_total" ["country", "reason"]
        "Active opens that never completed, by remote country and reason.";
    CountryConnectLatency Summary "connmon_country_connect_latency_seconds" ["country"]
        "Time active opens took from SYN to ESTABLISHED, by remote country.";
    CountryConnections Gauge "connmon_country_connections" ["country", "direction"]
        "TCP sockets in ESTABLISHED now, by remote country.";
    CountryClosed Counter "connmon_country_connections_closed_total" ["country", "direction"]
        "Connections that reached CLOSE, by remote country; failed connects are not among them.";
    CountryOpened Counter "connmon_country_connections_opened_total" ["country", "direction"]
        "TCP handshakes completed since start, by remote country.";
    CountryPortConnections Gauge "connmon_country_port_connections" ["country", "port", "direction"]
        "TCP sockets in ESTABLISHED now, by remote country and service port.";
    CountryPortOpened Counter "connmon_country_port_connections_opened_total" ["country", "port", "direction"]
        "TCP handshakes completed since start, by remote country and service port.";
    CountryReceivedBytes Counter "connmon_country_received_bytes_total" ["country", "direction"]
        "Payload bytes received, live connections included, by remote country.";
    CountryRetransmitted Counter "connmon_country_retransmitted_segments_total" ["country", "direction"]
        "Segments sent again, live connections included, by remote country.";
    CountryRtt Summary "connmon_country_rtt_seconds" ["country"]
        "Smoothed round-trip times, as sampled and at CLOSE, by remote country.";
    CountrySentBytes Counter "connmon_country_sent_bytes_total" ["country", "direction"]
        "Payload bytes sent, first transmissions, live connections included, by remote country.";
    Demo Gauge "connmon_demo" []
        "Constant 1: this is made-up demo traffic. Absent otherwise.";
    Drift Gauge "connmon_drift_connections" []
        "By how many connections the state from events was off at the last audit, before its correction.";
    DriftSuspected Gauge "connmon_drift_suspected_connections" []
        "Connections that the last audit did not find for the first time: wrong already, or closed meanwhile; the next audit decides.";
    EventsDropped Counter "connmon_events_dropped_total" ["reason"]
        "Kernel events lost: the ring buffer was full, or the record could not be decoded.";
    EventsFolded Counter "connmon_events_folded_total" []
        "Kernel events decoded and handled; produced = folded + dropped whenever the ring buffer is empty.";
    EventsProduced Counter "connmon_events_produced_total" []
        "Kernel events that the BPF programs tried to write to the ring buffer.";
    GeoipBuildTimestamp Gauge "connmon_geoip_database_build_timestamp_seconds" []
        "When the country database in use was built, Unix time.";
    GeoipInfo Gauge "connmon_geoip_database_info" ["database_type", "source"]
        "Constant 1, labelled with the country database in use.";
    GeoipReloads Counter "connmon_geoip_reloads_total" ["result"]
        "Reloads of the country database after its file changed or on SIGHUP; a failure keeps the old one in use.";
    ListeningSocketInfo Gauge "connmon_listening_socket_info" ["netns", "address", "port", "process", "pid"]
        "Listening sockets that share namespace, address and port, with the process of the lowest pid.";
    NetworkNamespaces Gauge "connmon_network_namespaces" ["access"]
        "Network namespaces watched, by how the last audit could read their sockets.";
    PortAcceptWait Summary "connmon_port_accept_wait_seconds" ["port"]
        "Time from the end of a passive handshake to accept() returning the connection, by local port.";
    PortCloseWait Gauge "connmon_port_close_wait_connections" ["port", "direction"]
        "Connections that the peer closed and the local program has not, at the last audit, by service port.";
    PortConnectFailures Counter "connmon_port_connect_failures_total" ["port", "reason"]
        "Active opens that never completed, by remote port and reason.";
    PortConnections Gauge "connmon_port_connections" ["port", "direction"]
        "TCP sockets in ESTABLISHED now, by service port.";
    PortClosed Counter "connmon_port_connections_closed_total" ["port", "direction"]
        "Connections that reached CLOSE, by service port; failed connects are not among them.";
    PortOpened Counter "connmon_port_connections_opened_total" ["port", "direction"]
        "TCP handshakes completed since start, by service port.";
    PortReceivedBytes Counter "connmon_port_received_bytes_total" ["port", "direction"]
        "Payload bytes received, live connections included, by service port.";
    PortRetransmitted Counter "connmon_port_retransmitted_segments_total" ["port", "direction"]
        "Segments sent again, live connections included, by service port.";
    PortSentBytes Counter "connmon_port_sent_bytes_total" ["port", "direction"]
        "Payload bytes sent, first transmissions, live connections included, by service port.";
    ProbeAttached Gauge "connmon_probe_attached" ["probe", "method"]
        "Whether a kernel probe is attached, and how; method is none where it is not.";
    ProbeMissedRuns Counter "connmon_probe_missed_runs_total" ["probe"]
        "Runs of a probe that the kernel skipped; absent where it does not tell.";
    ReconcileCorrections Counter "connmon_reconcile_corrections_total" ["action"]
        "Connections corrected from the kernel's own tables: seeded at start, added, removed, or updated in state.";
    ReconcileDuration Gauge "connmon_reconcile_duration_seconds" []
        "How long the last audit against the kernel's own tables took.";
    ReconcileInterval Gauge "connmon_reconcile_interval_seconds" []
        "Current interval of audits; stretched where an audit is expensive.";
    ReconcileRuns Counter "connmon_reconcile_runs_total" ["trigger"]
        "Audits against the kernel's own tables, by what caused them.";
    Rtt Histogram "connmon_rtt_seconds" ["direction"]
        "Smoothed round-trip times, as sampled and at CLOSE.";
    SeriesEvicted Counter "connmon_series_evicted_total" ["family"]
        "Idle series dropped to make room for another.";
    SeriesOverflow Counter "connmon_series_overflow_total" ["family"]
        "Connections or sockets that got no series of their own because the limit was reached.";
    SourceInfo Gauge "connmon_source_info" ["source"]
        "Constant 1, labelled with where connections come from: kernel events or polling.";
    StateConnections Gauge "connmon_state_connections" ["state"]
        "TCP sockets by state: established now, the other states at the last audit.";
    TableOverflow Counter "connmon_table_overflow_total" []
        "Connections opened while the connection table was full; they are in no gauge.";
    TombstoneOverflow Counter "connmon_tombstone_overflow_total" []
        "Closes during an audit that were forgotten for want of room; the next audits correct what they leave.";
    TrackedConnections Gauge "connmon_tracked_connections" []
        "Connections in the connection table.";
    UnattributedEvents Counter "connmon_unattributed_events_total" []
        "Events known to have happened whose country is lost.";
    UntrackedConnections Gauge "connmon_untracked_connections" []
        "Open connections that the full connection table has no place for.";
    Up Gauge "connmon_up" []
        "1 while the source delivers and the last audit is younger than three intervals.";
    ProcessCpuSeconds Counter "process_cpu_seconds_total" []
        "Total user and system CPU time spent in seconds.";
    ProcessMaxFds Gauge "process_max_fds" []
        "Maximum number of open file descriptors.";
    ProcessOpenFds Gauge "process_open_fds" []
        "Number of open file descriptors.";
    ProcessResidentMemory Gauge "process_resident_memory_bytes" []
        "Resident memory size in bytes.";
    ProcessStartTime Gauge "process_start_time_seconds" []
        "Start time of the process since unix epoch in seconds.";
    ProcessVirtualMemory Gauge "process_virtual_memory_bytes" []
        "Virtual memory size in bytes.";
    ProcessVirtualMemoryMax Gauge "process_virtual_memory_max_bytes" []
        "Maximum amount of virtual memory available in bytes.";
}

impl Id {
    /// The family behind it.
    pub fn family(self) -> &'static Family {
        &FAMILIES[self as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_well_named() {
        for pair in FAMILIES.windows(2) {
            assert!(
                pair[0].name < pair[1].name,
                "{} {}",
                pair[0].name,
                pair[1].name
            );
        }
        for family in FAMILIES {
            let total = family.name.ends_with("_total");
            assert_eq!(total, family.kind == Kind::Counter, "{}", family.name);
            assert!(
                family.help.ends_with('.') && family.help.len() > 20,
                "{}",
                family.name
            );
        }
        assert_eq!(Id::Up.family().name, "connmon_up");
    }
}
