//! What a scrape costs beyond the report: at about 100, 1,000 and 10,000
//! series, by a renderer that has seen the series before, and by a new one.
//!
//! Besides criterion's estimate of the mean this prints percentiles of single
//! renders, in CPU time of the thread, so that a busy machine changes them
//! little. The budget for the 99th is 1 ms at 1,000 and 5 ms at 10,000 series.

#[path = "../tests/support/report.rs"]
mod synthetic;

use std::hint::black_box;
use std::time::Duration;

use connmon::expose::metrics::Metrics;
use connmon_core::report::{Report, Source};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use synthetic::Size;

/// Renders for the percentile.
const ROUNDS: usize = 1_000;

fn sizes() -> Vec<(&'static str, Report)> {
    let size = |countries, ports, cross, listeners| {
        synthetic::report(Size {
            countries,
            ports,
            cross,
            listeners,
        })
    };
    let mut smallest = size(0, 0, 0, 0);
    smallest.snapshot.traffic_known = false;
    smallest.snapshot.accept_known = false;
    smallest.status.source = Source::Proc;
    vec![
        ("100", smallest),
        ("1k", size(20, 6, 0, 8)),
        ("10k", size(215, 64, 0, 512)),
    ]
}

fn samples(text: &[u8]) -> usize {
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty() && !line.starts_with(b"#"))
        .count()
}

/// Changes what changes between two scrapes: every number.
fn advance(report: &mut Report) {
    for country in &mut report.snapshot.countries {
        for flow in &mut country.flows {
            flow.opened += 3;
            flow.received_bytes += 12_345;
            flow.sent_bytes += 54_321;
        }
    }
    for port in &mut report.snapshot.ports {
        port.flow.opened += 5;
        port.flow.sent_bytes += 99_999;
    }
}

fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn percentile(times: &mut [Duration], part: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * part) as usize]
}

fn scrape(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scrape");
    for (name, mut report) in sizes() {
        let mut metrics = Metrics::new();
        let count = samples(&metrics.render(&report));
        let mut times: Vec<Duration> = (0..ROUNDS)
            .map(|_| {
                advance(&mut report);
                let start = cpu_time();
                black_box(metrics.render(&report));
                cpu_time() - start
            })
            .collect();
        println!(
            "scrape/{name}: {count} samples, p50 {:?}, p99 {:?}",
            percentile(&mut times, 0.5),
            percentile(&mut times, 0.99),
        );
        group.bench_function(BenchmarkId::new("again", name), |bencher| {
            bencher.iter(|| {
                advance(&mut report);
                black_box(metrics.render(&report))
            });
        });
        group.bench_function(BenchmarkId::new("first", name), |bencher| {
            bencher.iter_with_setup(Metrics::new, |mut metrics| {
                black_box(metrics.render(&report))
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(300))
        .sample_size(30);
    targets = scrape
}
criterion_main!(benches);
