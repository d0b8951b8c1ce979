//! The one table of metric names, with their types, labels and help texts.
//! docs/metrics.md is generated from it.

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

/// Declares identifiers and table in one list, so that neither lacks an entry of
/// the other.
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
        "Connections waiting for accept() at the last audit (--reconcile.interval), summed over the sockets that share network namespace, address and port.";
    AcceptQueueLimit Gauge "connmon_accept_queue_limit" ["netns", "address", "port"]
        "Most connections that may wait for accept(), from the listen() backlog, summed over the sockets that share network namespace, address and port.";
    AcceptWait Histogram "connmon_accept_wait_seconds" []
        "Seconds from the end of an inbound handshake to accept() returning the connection.";
    BpfProgramRunSeconds Counter "connmon_bpf_program_run_seconds_total" ["program"]
        "Seconds the kernel spent in a BPF program; absent unless the kernel measures it (--ebpf.stats).";
    BpfProgramRuns Counter "connmon_bpf_program_runs_total" ["program"]
        "Runs of a BPF program; absent unless the kernel counts them (--ebpf.stats).";
    BuildInfo Gauge "connmon_build_info" ["version", "revision", "branch", "rustversion", "target"]
        "Always 1; the labels describe the build of this connmon.";
    ConnectLatency Histogram "connmon_connect_latency_seconds" []
        "Seconds from SYN to ESTABLISHED of outbound connections.";
    ConnectionDuration Histogram "connmon_connection_duration_seconds" ["direction"]
        "Seconds from the end of the handshake to CLOSE, of connections opened since connmon started.";
    CountryConnectFailures Counter "connmon_country_connect_failures_total" ["country", "reason"]
        "Outbound connections that never completed their handshake, by country of the remote address and reason.";
    CountryConnectLatency Summary "connmon_country_connect_latency_seconds" ["country"]
        "Seconds from SYN to ESTABLISHED of outbound connections, by country of the remote address.";
    CountryConnections Gauge "connmon_country_connections" ["country", "direction"]
        "TCP sockets in state ESTABLISHED now, by country of the remote address, after --filter.loopback and --filter.exclude.";
    CountryClosed Counter "connmon_country_connections_closed_total" ["country", "direction"]
        "Connections that reached state CLOSE since connmon started, by country of the remote address; failed connects are not included.";
    CountryOpened Counter "connmon_country_connections_opened_total" ["country", "direction"]
        "TCP handshakes completed since connmon started, by country of the remote address.";
    CountryPortConnections Gauge "connmon_country_port_connections" ["country", "port", "direction"]
        "TCP sockets in state ESTABLISHED now, by country of the remote address and service port; only with --metrics.country-port, at most 2,000 label sets.";
    CountryPortOpened Counter "connmon_country_port_connections_opened_total" ["country", "port", "direction"]
        "TCP handshakes completed since connmon started, by country of the remote address and service port; only with --metrics.country-port, at most 2,000 label sets.";
    CountryReceivedBytes Counter "connmon_country_received_bytes_total" ["country", "direction"]
        "Payload bytes received, by country of the remote address; of live connections sampled every --traffic.interval.";
    CountryRetransmitted Counter "connmon_country_retransmitted_segments_total" ["country", "direction"]
        "TCP segments retransmitted, by country of the remote address; of live connections sampled every --traffic.interval.";
    CountryRtt Summary "connmon_country_rtt_seconds" ["country"]
        "Seconds of smoothed round-trip time, observed every --traffic.interval and at CLOSE, by country of the remote address.";
    CountrySentBytes Counter "connmon_country_sent_bytes_total" ["country", "direction"]
        "Payload bytes sent, without retransmissions, by country of the remote address; of live connections sampled every --traffic.interval.";
    Demo Gauge "connmon_demo" []
        "Always 1 in a demo, whose traffic is made up; absent otherwise.";
    Drift Gauge "connmon_drift_connections" []
        "Connections that the last audit (--reconcile.interval) added, removed or moved into or out of ESTABLISHED: the error of the gauges just before it.";
    DriftSuspected Gauge "connmon_drift_suspected_connections" []
        "Connections that the last audit (--reconcile.interval) was the first not to find: closed since, or wrong already; the next audit decides.";
    EventsDropped Counter "connmon_events_dropped_total" ["reason"]
        "Kernel events lost: ring_full, no space in the ring buffer (--ebpf.ring-buffer-size), or undecodable, not a valid record.";
    EventsFolded Counter "connmon_events_folded_total" []
        "Kernel events decoded and counted; produced = folded + dropped whenever the ring buffer is empty.";
    EventsProduced Counter "connmon_events_produced_total" []
        "Kernel events that the BPF programs tried to write to the ring buffer.";
    GeoipBuildTimestamp Gauge "connmon_geoip_database_build_timestamp_seconds" []
        "Unix time in seconds at which the country database in use was built.";
    GeoipInfo Gauge "connmon_geoip_database_info" ["database_type", "source"]
        "Always 1; the labels describe the country database in use (--geoip.database).";
    GeoipReloads Counter "connmon_geoip_reloads_total" ["result"]
        "Reloads of the country database (--geoip.database) since connmon started; after a failure the old one stays in use.";
    ListeningSocketInfo Gauge "connmon_listening_socket_info" ["netns", "address", "port", "process", "pid"]
        "Listening sockets that share network namespace, address and port, with the process of the lowest pid; at most --listeners.max series.";
    MissedCloses Counter "connmon_missed_closes_total" []
        "Connections whose close no event reported, found by a new socket at the same kernel address; each starts an audit.";
    NetworkNamespaces Gauge "connmon_network_namespaces" ["access"]
        "Network namespaces watched, by how the last audit (--reconcile.interval) read their sockets: sock_diag, /proc, or not at all.";
    PortAcceptWait Summary "connmon_port_accept_wait_seconds" ["port"]
        "Seconds from the end of an inbound handshake to accept() returning the connection, by local port; at most --ports.max ports.";
    PortCloseWait Gauge "connmon_port_close_wait_connections" ["port", "direction"]
        "Connections in state CLOSE_WAIT at the last audit (--reconcile.interval): closed by the peer but not by the local process, by service port.";
    PortConnectFailures Counter "connmon_port_connect_failures_total" ["port", "reason"]
        "Outbound connections that never completed their handshake, by remote port and reason; at most --ports.max ports.";
    PortConnections Gauge "connmon_port_connections" ["port", "direction"]
        "TCP sockets in state ESTABLISHED now, by service port; at most --ports.max ports per direction.";
    PortClosed Counter "connmon_port_connections_closed_total" ["port", "direction"]
        "Connections that reached state CLOSE since connmon started, by service port; failed connects are not included.";
    PortOpened Counter "connmon_port_connections_opened_total" ["port", "direction"]
        "TCP handshakes completed since connmon started, by service port; at most --ports.max ports per direction.";
    PortReceivedBytes Counter "connmon_port_received_bytes_total" ["port", "direction"]
        "Payload bytes received, by service port; of live connections sampled every --traffic.interval.";
    PortRetransmitted Counter "connmon_port_retransmitted_segments_total" ["port", "direction"]
        "TCP segments retransmitted, by service port; of live connections sampled every --traffic.interval.";
    PortSentBytes Counter "connmon_port_sent_bytes_total" ["port", "direction"]
        "Payload bytes sent, without retransmissions, by service port; of live connections sampled every --traffic.interval.";
    ProbeAttached Gauge "connmon_probe_attached" ["probe", "method"]
        "1 if the kernel probe is attached, and by which method (--ebpf.attach); 0 with method none if it is not.";
    ProbeMissedRuns Counter "connmon_probe_missed_runs_total" ["probe"]
        "Runs of a probe that the kernel skipped (recursion misses); each starts an audit. Absent where the kernel does not count them.";
    ReconcileCorrections Counter "connmon_reconcile_corrections_total" ["action"]
        "Connections that the initial scan seeded from the kernel's socket tables, or that audits added, removed or updated in state.";
    ReconcileDuration Gauge "connmon_reconcile_duration_seconds" []
        "Seconds that the last audit against the kernel's socket tables took (--reconcile.interval).";
    ReconcileInterval Gauge "connmon_reconcile_interval_seconds" []
        "Seconds between audits: --reconcile.interval, longer where an audit would take more than 0.5 % of a core.";
    ReconcileRuns Counter "connmon_reconcile_runs_total" ["trigger"]
        "Scans of the kernel's socket tables: startup, the initial scan; interval, periodic audits; loss, audits after lost events.";
    Rtt Histogram "connmon_rtt_seconds" ["direction"]
        "Seconds of smoothed round-trip time, observed every --traffic.interval and at CLOSE.";
    SeriesEvicted Counter "connmon_series_evicted_total" ["family"]
        "Idle series removed because another needed their place; limits are --ports.max and 2,000 label sets of --metrics.country-port.";
    SeriesOverflow Counter "connmon_series_overflow_total" ["family"]
        "Connections or listening sockets without series of their own, because --ports.max, --listeners.max or the 2,000 label sets of --metrics.country-port were reached.";
    SourceInfo Gauge "connmon_source_info" ["source"]
        "Always 1; the label is the source of connections: ebpf, kernel events, or proc, polling every --proc.interval.";
    StateConnections Gauge "connmon_state_connections" ["state"]
        "TCP sockets by state: established now, the other states at the last audit (--reconcile.interval).";
    TableOverflow Counter "connmon_table_overflow_total" []
        "Connections opened while --connections.max connections were tracked; they are in no gauge.";
    TombstoneOverflow Counter "connmon_tombstone_overflow_total" []
        "Closes during an audit that connmon could not remember; the next two audits correct what follows from it.";
    TrackedConnections Gauge "connmon_tracked_connections" []
        "Connections that connmon keeps in its table now, at most --connections.max.";
    UnattributedEvents Counter "connmon_unattributed_events_total" []
        "Lost kernel events that may have opened or closed a connection; its country and port do not count it.";
    UntrackedConnections Gauge "connmon_untracked_connections" []
        "Connections open now that did not fit below --connections.max; they are in no gauge.";
    Up Gauge "connmon_up" []
        "1 if the source delivers events and the last audit is younger than three intervals (--reconcile.interval), else 0.";
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
