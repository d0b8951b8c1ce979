//! What it costs to place an address: within one network, across the world,
//! and without the database.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use connmon_core::geo::{Database, Locate, Locator};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

/// Addresses in one batch.
const ADDRESSES: u32 = 65_536;

/// A cheap permutation: the same addresses in every run.
fn scattered(n: u32) -> u32 {
    n.wrapping_mul(0x9e37_79b9) ^ 0x5bd1_e995
}

fn country(criterion: &mut Criterion) {
    let database = Arc::new(Database::embedded().expect("the embedded database opens"));
    let v4: Vec<IpAddr> = (0..ADDRESSES)
        .map(|n| Ipv4Addr::from_bits(scattered(n)).into())
        .collect();
    let v6: Vec<IpAddr> = (0..ADDRESSES)
        .map(|n| {
            // 2000::/3 is where there are countries.
            let high = u128::from(0x2000_0000 | scattered(n) >> 3) << 96;
            Ipv6Addr::from_bits(high | u128::from(scattered(!n))).into()
        })
        .collect();
    let near: Vec<IpAddr> = (0..ADDRESSES)
        .map(|n| Ipv4Addr::from_bits(0x0808_0800 | (n & 0xff)).into())
        .collect();
    let private: Vec<IpAddr> = (0..ADDRESSES)
        .map(|n| Ipv4Addr::from_bits(0x0a00_0000 | n).into())
        .collect();

    let mut group = criterion.benchmark_group("country");
    group.throughput(Throughput::Elements(ADDRESSES.into()));
    for (name, addresses) in [
        ("world_v4", &v4),
        ("world_v6", &v6),
        ("one_network", &near),
        ("private", &private),
    ] {
        let mut locator = Locator::new(Arc::clone(&database));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                for address in addresses {
                    black_box(locator.country(*address));
                }
            });
        });
    }
    group.bench_function("world_v4_empty_cache", |bencher| {
        bencher.iter_batched_ref(
            || Locator::new(Arc::clone(&database)),
            |locator| {
                for address in &v4 {
                    black_box(locator.country(*address));
                }
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(300))
        .sample_size(20);
    targets = country
}
criterion_main!(benches);
