//! The mask engine, one thread, every instruction set of this processor: `cargo bench --bench masks`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hiddenkey_rs::apply::Rows;
use hiddenkey_rs::mask::plan::{Documents, Entry, Planned, plan};
use hiddenkey_rs::mask::{Shape, bits, column, element, element_bytes, span};
use hiddenkey_rs::rng::stream::{Site, SiteKey};
use hiddenkey_rs::simd::{Engine, Level};
use hiddenkey_rs::threads::Run;
use std::time::Duration;

const THRESHOLD: u32 = 6554;

fn key() -> SiteKey {
    Site { seed: 1, step: 2, branch: 0, layer: 3, site: 0 }.key().expect("within limits")
}

fn runs() -> impl Iterator<Item = (&'static str, Run<'static>)> {
    let engines = Level::ALL.into_iter().filter_map(|level| Engine::new(level).ok());
    engines.map(|engine| (engine.level().name(), Run { engine, threads: 1, interrupted: &|| false }))
}

fn elements(c: &mut Criterion) {
    for size in [12, 16, 20, 24] {
        let (rows, columns) = (1 << (size - size / 2), 1 << (size / 2));
        let shape = Shape { samples: &[77], heads: 1, rows, columns };
        let mut group = c.benchmark_group(format!("element 2^{size}"));
        group.throughput(Throughput::Elements(1 << size));
        for (name, run) in runs() {
            let mut words = vec![0; rows * bits::words(columns)];
            group.bench_function(BenchmarkId::new("packed", name), |b| {
                b.iter(|| element(&run, key(), shape, THRESHOLD, &mut words).unwrap());
            });
            let mut bytes = vec![0; rows * columns];
            group.bench_function(BenchmarkId::new("bytes", name), |b| {
                b.iter(|| element_bytes(&run, key(), shape, THRESHOLD, &mut bytes).unwrap());
            });
        }
    }
}

fn structured(c: &mut Criterion) {
    let samples: Vec<u64> = (0..32).collect();
    let lengths = [512; 32];
    let shape = Shape { samples: &samples, heads: 16, rows: 1, columns: 512 };
    let mut group = c.benchmark_group("(32, 16, 512)");
    group.throughput(Throughput::Elements(32 * 16 * 512));
    for (name, run) in runs() {
        let mut words = vec![0; 32 * 16 * 16];
        group.bench_function(BenchmarkId::new("column", name), |b| {
            b.iter(|| column(&run, key(), shape, Some(&lengths), THRESHOLD, &mut words).unwrap());
        });
        group.bench_function(BenchmarkId::new("span", name), |b| {
            b.iter(|| span(&run, key(), shape, &lengths, THRESHOLD, &mut words).unwrap());
        });
    }
    group.finish();
    let mut group = c.benchmark_group("plan of 24 layers, (32, 16, 512)");
    group.throughput(Throughput::Elements(24 * 32 * 16 * 512));
    let documents = Documents { samples: &samples, branches: &[0; 32], lengths: &lengths, columns: 512 };
    for (name, run) in runs() {
        for pattern in [Planned::Column, Planned::Span] {
            let entries: Vec<Entry> =
                (0..24).map(|layer| Entry { layer, site: 0, pattern, heads: 16, threshold: THRESHOLD }).collect();
            let (mut words, mut counts) = (vec![0; 24 * 32 * 16 * 16], vec![0; 24 * 32 * 16]);
            group.bench_function(BenchmarkId::new(format!("{pattern:?}"), name), |b| {
                b.iter(|| plan(&run, (1, 2), &entries, documents, &mut words, &mut counts).unwrap());
            });
        }
    }
}

fn applied(c: &mut Criterion) {
    let (rows, features) = (4096, 1024);
    let (samples, positions): (Vec<i64>, Vec<i64>) = (0..rows as i64).map(|row| (row / 512, row % 512)).unzip();
    let tokens = Rows { samples: &samples, positions: &positions };
    let mut group = c.benchmark_group("dropout applied (4096, 1024)");
    group.throughput(Throughput::Elements((rows * features) as u64));
    let (x, mut out) = (vec![1.0f32; rows * features], vec![0.0f32; rows * features]);
    let (h, mut hout) = (vec![0x3F80u16; rows * features], vec![0u16; rows * features]);
    group.bench_function("a copy of float32", |b| b.iter(|| out.copy_from_slice(std::hint::black_box(&x))));
    for (name, run) in runs() {
        let apply = hiddenkey_rs::apply::element::<f32>;
        group.bench_function(BenchmarkId::new("float32", name), |b| {
            b.iter(|| apply(&run, key(), tokens, THRESHOLD, 1.1, &x, &mut out).unwrap());
        });
        let apply = hiddenkey_rs::apply::element::<u16>;
        group.bench_function(BenchmarkId::new("bfloat16", name), |b| {
            b.iter(|| apply(&run, key(), tokens, THRESHOLD, 1.1, &h, &mut hout).unwrap());
        });
    }
}

fn quick() -> Criterion {
    Criterion::default()
        .sample_size(15)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .without_plots()
}

criterion_group! { name = masks; config = quick(); targets = elements, structured, applied }
criterion_main!(masks);
