//! Whether masks of stream `hk1` are what independent bits of their rate would be: `cargo bench --bench stats [-- --quick]`.
//!
//! Prints a report in Markdown, one row a test, and exits with status 1 if a test fails. `cargo test` runs it as well, with
//! fewer draws, and shows failures alone. z is in standard deviations; that
//! of a chi-square is Wilson and Hilferty's approximation (PNAS 17, 1931). The stream is fixed, so the report is too: it can
//! only change where the masks do.

use Neighbour::{Column, Elsewhere, Inside};
use hiddenkey_rs::mask::threshold::{LEVELS, threshold};
use hiddenkey_rs::mask::{Shape, bits, column, element, span};
use hiddenkey_rs::rng::philox::philox4x32;
use hiddenkey_rs::rng::stream::{Pattern, Site};
use hiddenkey_rs::threads::Run;
use hiddenkey_rs::{Result, STREAM};
use std::collections::HashSet;
use std::fmt::Display;
use std::process::ExitCode;

/// A test fails beyond so many standard deviations: sound masks do so once in 1.7 million tests.
const LIMIT: f64 = 5.0;
/// Cells of a chi-square are pooled until each expects so many.
const LEAST_EXPECTED: f64 = 5.0;
/// The user's seed. Others are this and the next few, as the ranks of one job would have them.
const SEED: u64 = 42;

/// What the tests of neighbours look at.
const PATTERNS_AND_RATES: [(Pattern, f64); 4] =
    [(Pattern::Element, 0.1), (Pattern::Element, 0.5), (Pattern::Column, 0.1), (Pattern::Column, 0.5)];

/// Pairs of bits for a correlation.
const PAIRS: u64 = 1 << 28;
/// Bits whose runs and neighbouring pairs are counted.
const BITS: u64 = 1 << 28;
/// Counters of the generator whose eight lanes are counted.
const COUNTERS: u64 = 1 << 27;
/// Spans for a length and rate.
const SPANS: u64 = 1 << 20;
/// The quick report draws so many times less.
const QUICK: u64 = 1 << 5;

/// Decisions for a rate: 2^32 or more. A threshold that is off by one moves what is dropped by 8 standard deviations or
/// more, which at rate .5 takes 2^36.
fn decisions(threshold: u32) -> u64 {
    (64 * u64::from(threshold) * u64::from(LEVELS - threshold)).max(1 << 32)
}

/// The report so far.
struct Report {
    /// Leave out what passes.
    brief: bool,
    tests: usize,
    failures: usize,
}

impl Report {
    /// Start a table.
    fn table(&self, title: &str) {
        if !self.brief {
            println!("\n## {title}\n\n| test | statistic | n or degrees of freedom | expected | z | verdict |");
            println!("|---|---|---|---|---|---|");
        }
    }

    fn row(&mut self, test: &str, values: [&dyn Display; 4], passed: bool) {
        let [statistic, n, expected, z] = values;
        let verdict = if passed { "pass" } else { "**FAIL**" };
        if !(self.brief && passed) {
            println!("| {test} | {statistic} | {n} | {expected} | {z} | {verdict} |");
        }
        self.tests += 1;
        self.failures += usize::from(!passed);
    }

    /// A statistic `z` standard deviations from what is expected.
    fn normal(&mut self, test: &str, statistic: &dyn Display, n: u64, expected: &dyn Display, z: f64) {
        self.row(test, [statistic, &n, expected, &format_args!("{z:+.2}")], z.abs() <= LIMIT);
    }

    /// A number that has one right value.
    fn exact(&mut self, test: &str, found: u64, n: u64, expected: u64) {
        self.row(test, [&found, &n, &expected, &"exact"], found == expected);
    }

    /// Counts of cells against their probabilities, which add up to 1.
    fn chi_square(&mut self, test: &str, counts: &[u64], probability: impl Fn(usize) -> f64) {
        let n = counts.iter().sum::<u64>() as f64;
        let (mut pools, mut pool) = (vec![], (0.0, 0.0));
        for (cell, &count) in counts.iter().enumerate() {
            pool = (pool.0 + count as f64, pool.1 + n * probability(cell));
            if pool.1 >= LEAST_EXPECTED {
                pools.push(std::mem::take(&mut pool));
            }
        }
        if let Some(last) = pools.last_mut() {
            *last = (last.0 + pool.0, last.1 + pool.1);
        }
        let statistic: f64 = pools.iter().map(|(count, expected)| (count - expected).powi(2) / expected).sum();
        let freedom = pools.len().saturating_sub(1) as u64;
        let spread = 2.0 / (9.0 * freedom as f64);
        let z = ((statistic / freedom as f64).cbrt() - (1.0 - spread)) / spread.sqrt();
        self.normal(test, &format_args!("{statistic:.1}"), freedom, &freedom, z);
    }
}

/// Columns of a block.
const COLUMNS: usize = 1 << 10;
/// Decisions of a block: few enough that its bits stay in the second-level cache.
const BLOCK: usize = 1 << 20;

/// A mask of [`BLOCK`] decisions, (samples, heads, rows, columns), and where it lies.
#[derive(Clone)]
struct Block {
    pattern: Pattern,
    site: Site,
    samples: Vec<u64>,
    heads: usize,
    rows: usize,
    words: Vec<u32>,
}

impl Block {
    fn new(pattern: Pattern) -> Self {
        let (samples, heads, rows) = if pattern == Pattern::Element { (8, 4, 32) } else { (128, 8, 1) };
        Block { pattern, site: site(0), samples: vec![0; samples], heads, rows, words: vec![0; BLOCK / 32] }
    }

    /// Draw block `index`. Each has a site of its own, and neighbouring samples from anywhere below 2^39.
    fn draw(&mut self, run: &Run<'_>, index: u64, threshold: u32) -> Result<()> {
        let first = index.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 25;
        self.samples.iter_mut().zip(first..).for_each(|(sample, id)| *sample = id);
        self.site = site(index);
        self.redraw(run, threshold)
    }

    /// Draw the mask at the place where the block now lies.
    fn redraw(&mut self, run: &Run<'_>, threshold: u32) -> Result<()> {
        let key = self.site.key()?;
        let shape = Shape { samples: &self.samples, heads: self.heads, rows: self.rows, columns: COLUMNS };
        match self.pattern {
            Pattern::Element => element(run, key, shape, threshold, &mut self.words),
            _ => column(run, key, shape, None, threshold, &mut self.words),
        }
    }

    /// The words of every row.
    fn lines(&self) -> impl Iterator<Item = &[u32]> {
        self.words.chunks_exact(COLUMNS / 32)
    }
}

/// Sites as training visits them: small numbers, several of them changing from one to the next.
fn site(index: u64) -> Site {
    Site { seed: SEED + index % 8, step: index / 8, branch: index % 3, layer: index % 24, site: index % 10 }
}

/// The share of decisions that are dropped.
fn rates(run: &Run<'_>, less: u64, report: &mut Report) -> Result<()> {
    report.table("Realised rate");
    let least = 1.0 / f64::from(LEVELS);
    let mut places = 0..;
    let named = [(".01", 0.01), (".1", 0.1), (".15", 0.15), (".5", 0.5), (".9", 0.9)];
    for (name, rate) in [("2^-16", least)].into_iter().chain(named).chain([("1 - 2^-16", 1.0 - least)]) {
        let t = threshold(rate)?;
        let blocks = (decisions(t) / less).div_ceil(BLOCK as u64);
        let mut block = Block::new(Pattern::Element);
        let mut kept = 0;
        for index in places.by_ref().take(blocks as usize) {
            block.draw(run, index, t)?;
            kept += u64::from(run.engine.count(&block.words));
        }
        let n = blocks * BLOCK as u64;
        let share = f64::from(t) / f64::from(LEVELS);
        let expected = n as f64 * share;
        let z = ((n - kept) as f64 - expected) / (expected * (1.0 - share)).sqrt();
        report.normal(&format!("dropped at rate {name}"), &(n - kept), n, &expected, z);
    }
    Ok(())
}

/// How far the mean of mask * scale is from 1: every factor is exact in float64 but the rounding of the scale itself.
fn scales(report: &mut Report) {
    report.table("Expectation");
    let error = |t: u32| {
        let keep = 1.0 - f64::from(t) / f64::from(LEVELS);
        let scale = (1.0 / keep) as f32;
        (keep * f64::from(scale) - 1.0).abs()
    };
    let worst = (1..LEVELS).map(|t| (error(t), t)).fold((0.0, 0), |a, b| if b.0 > a.0 { b } else { a });
    let bound = 0.5f64.powi(24);
    let test = format!("worst abs(keep probability * scale - 1), at threshold {}", worst.1);
    let values: [&dyn Display; 4] =
        [&format_args!("{:.4e}", worst.0), &(LEVELS - 1), &format_args!("<= 2^-24 = {bound:.4e}"), &"exact"];
    report.row(&test, values, worst.0 <= bound);
}

/// Counts of pairs of bits.
#[derive(Default)]
struct Pairs {
    n: u64,
    first: u64,
    second: u64,
    both: u64,
}

impl Pairs {
    /// Count the bits of two words that `places` marks.
    fn add(&mut self, a: u32, b: u32, places: u32) {
        self.n += u64::from(places.count_ones());
        self.first += u64::from((a & places).count_ones());
        self.second += u64::from((b & places).count_ones());
        self.both += u64::from((a & b & places).count_ones());
    }

    fn add_all(&mut self, a: &[u32], b: &[u32]) {
        a.iter().zip(b).for_each(|(&a, &b)| self.add(a, b, u32::MAX));
    }

    /// Pearson's correlation of the two bits.
    fn correlation(&self) -> f64 {
        let [n, a, b, both] = [self.n, self.first, self.second, self.both].map(i128::from);
        (n * both - a * b) as f64 / ((a * (n - a)) as f64 * (b * (n - b)) as f64).sqrt()
    }
}

/// The words of a row beside the row moved by `lag` columns, as far as whole words of both reach.
fn lagged(row: &[u32], lag: usize) -> impl Iterator<Item = (u32, u32)> {
    let (skip, shift) = (lag / 32, lag % 32);
    let wide = |i: usize| u64::from(row[i]) | u64::from(row.get(i + 1).copied().unwrap_or(0)) << 32;
    let reach = row.len() - skip - usize::from(shift > 0);
    (0..reach).map(move |i| (row[i], (wide(i + skip) >> shift) as u32))
}

/// Longer runs count as this long: at rate .1 there is one in 10^45.
const LONGEST: usize = 1000;

/// Count runs of equal bits, of 0 and of 1, by their length less one; `state` is the last bit and its run's length so far.
fn count_runs(words: &[u32], state: &mut (bool, usize), counts: &mut [Vec<u64>; 2]) {
    for bit in words.iter().flat_map(|word| (0..32).map(move |place| word >> place & 1 == 1)) {
        let (last, length) = *state;
        if bit != last && length > 0 {
            counts[usize::from(last)][length.min(LONGEST) - 1] += 1;
        }
        *state = (bit, if bit == last { length + 1 } else { 1 });
    }
}

/// Runs of equal bits along the columns, rows laid end to end, and the four values of two neighbouring columns.
fn neighbouring_columns(run: &Run<'_>, less: u64, report: &mut Report) -> Result<()> {
    report.table("Runs and pairs along columns (chi-square)");
    for (pattern, rate) in PATTERNS_AND_RATES {
        let t = threshold(rate)?;
        let mut block = Block::new(pattern);
        let (mut state, mut runs) = ((false, 0), [vec![0; LONGEST], vec![0; LONGEST]]);
        // Two columns share a word of the generator from an even column on, and none from an odd one on.
        let mut pairs = [("even", 0x5555_5555, Pairs::default()), ("odd", 0xAAAA_AAAA, Pairs::default())];
        for index in 0..(BITS / less).div_ceil(BLOCK as u64) {
            block.draw(run, index, t)?;
            count_runs(&block.words, &mut state, &mut runs);
            for (a, b) in block.lines().flat_map(|row| lagged(row, 1)) {
                pairs.iter_mut().for_each(|(_, places, pairs)| pairs.add(a, b, *places));
            }
        }
        let drop = f64::from(t) / f64::from(LEVELS);
        for (name, counts, stay) in [("dropped", &runs[0], drop), ("kept", &runs[1], 1.0 - drop)] {
            let end = |length: usize| if length + 1 == LONGEST { 1.0 } else { 1.0 - stay };
            let geometric = |length: usize| stay.powi(length as i32) * end(length);
            report.chi_square(&format!("{pattern:?}, rate {rate}: runs of {name}"), counts, geometric);
        }
        for (name, _, Pairs { n, first, second, both }) in pairs {
            let cells = [n + both - first - second, first - both, second - both, both];
            let probabilities = [drop * drop, drop * (1.0 - drop), drop * (1.0 - drop), (1.0 - drop).powi(2)];
            let test = format!("{pattern:?}, rate {rate}: pairs from {name} columns on");
            report.chi_square(&test, &cells, |cell| probabilities[cell]);
        }
    }
    Ok(())
}

/// Every value of the 16-bit lanes that a rate's threshold is compared with, under the counters of real masks.
fn lanes(less: u64, report: &mut Report) -> Result<()> {
    report.table("Raw 16-bit lanes, 65536 cells (chi-square)");
    let mut counts = vec![vec![0u64; 1 << 16]; 8];
    for index in 0..(COUNTERS / less) >> 16 {
        let key = site(index).key()?;
        for place in 0..1 << 16 {
            // Blocks 0..16 of rows 0..512 of heads 0..8.
            let counter = [place >> 4 & 511 | place >> 13 << 20, place & 15, index as u32, 0];
            for (word, counts) in philox4x32(counter, key.0).into_iter().zip(counts.chunks_exact_mut(2)) {
                counts[0][word as usize & 0xFFFF] += 1;
                counts[1][word as usize >> 16] += 1;
            }
        }
    }
    let uniform = |_: usize| 1.0 / f64::from(LEVELS);
    for (lane, counts) in counts.iter().enumerate() {
        report.chi_square(&format!("word {}, {} half", lane / 2, ["low", "high"][lane % 2]), counts, uniform);
    }
    let all: Vec<u64> = (0..1 << 16).map(|value| counts.iter().map(|lane| lane[value]).sum()).collect();
    report.chi_square("all lanes", &all, uniform);
    Ok(())
}

/// Where the second bit of a pair lies.
#[derive(Clone, Copy)]
enum Neighbour {
    /// So many columns on.
    Column(usize),
    /// So many rows of the block on, within groups of so many times as many.
    Inside(fn(&Block) -> (usize, usize)),
    /// At the same place of another block.
    Elsewhere(fn(&mut Block)),
}

const NEIGHBOURS: [(&str, Neighbour); 14] = [
    ("column + 1", Column(1)),
    ("column + 2", Column(2)),
    ("column + 16", Column(16)),
    ("column + 32", Column(32)),
    ("column + 128", Column(128)),
    ("head + 1", Inside(|block| (block.rows, block.heads))),
    ("sample + 1", Elsewhere(|block| block.samples.iter_mut().for_each(|sample| *sample += 1))),
    ("sample + 2^32", Elsewhere(|block| block.samples.iter_mut().for_each(|sample| *sample += 1 << 32))),
    ("site + 1", Elsewhere(|block| block.site.site += 1)),
    ("layer + 1", Elsewhere(|block| block.site.layer += 1)),
    ("branch + 1", Elsewhere(|block| block.site.branch += 1)),
    ("step + 1", Elsewhere(|block| block.site.step += 1)),
    ("seed + 1", Elsewhere(|block| block.site.seed += 1)),
    ("seed + 2^32", Elsewhere(|block| block.site.seed += 1 << 32)),
];

/// Count the pairs of bits that a block has with its neighbours.
fn count(run: &Run<'_>, block: &Block, t: u32, to: Neighbour, pairs: &mut Pairs) -> Result<()> {
    match to {
        Column(lag) => block.lines().flat_map(|row| lagged(row, lag)).for_each(|(a, b)| pairs.add(a, b, u32::MAX)),
        Inside(axis) => {
            let (rows, extent) = axis(block);
            let stride = rows * COLUMNS / 32;
            block.words.chunks_exact(stride * extent).for_each(|words| pairs.add_all(words, &words[stride..]));
        }
        Elsewhere(change) => {
            let mut other = block.clone();
            change(&mut other);
            other.redraw(run, t)?;
            pairs.add_all(&block.words, &other.words);
        }
    }
    Ok(())
}

/// The correlation of bits whose places differ by one step in one coordinate.
fn correlations(run: &Run<'_>, less: u64, report: &mut Report) -> Result<()> {
    report.table("Correlation with the neighbour in one coordinate");
    let mut index = 0;
    for (pattern, rate) in PATTERNS_AND_RATES {
        let t = threshold(rate)?;
        let own = match pattern {
            Pattern::Element => ("row + 1", Inside(|block| (1, block.rows))),
            _ => ("element mask", Elsewhere(|block| block.pattern = Pattern::Element)),
        };
        for (name, to) in NEIGHBOURS.into_iter().chain([own]) {
            let (mut block, mut pairs) = (Block::new(pattern), Pairs::default());
            while pairs.n < PAIRS / less {
                block.draw(run, index, t)?;
                count(run, &block, t, to, &mut pairs)?;
                index += 1;
            }
            let r = pairs.correlation();
            let test = format!("{pattern:?}, rate {rate}: {name}");
            report.normal(&test, &format_args!("{r:+.2e}"), pairs.n, &0, r * (pairs.n as f64).sqrt());
        }
    }
    Ok(())
}

/// No two masks of 128 columns are equal, wherever they lie and whichever rank of a job draws them. Ranks have one seed;
/// what keeps them apart is that each draws for samples of its own.
fn distinct(run: &Run<'_>, report: &mut Report) -> Result<()> {
    const RANKS: u64 = 8;
    report.table("Distinct masks");
    let t = threshold(0.5)?;
    for pattern in [Pattern::Element, Pattern::Column] {
        let (mut seen, mut drawn) = (HashSet::new(), 0);
        // 8 ranks x 10 steps x 2 branches x 5 layers x 25 samples x 5 heads.
        for place in 0..RANKS * 10 * 2 * 5 {
            let (rank, step) = (place % RANKS, place / RANKS % 10);
            let (branch, layer) = (place / RANKS / 10 % 2, place / RANKS / 10 / 2);
            let key = Site { seed: SEED, step, branch, layer, site: 0 }.key()?;
            let samples: Vec<u64> = (0..25).map(|n| (25 * step + n) * RANKS + rank).collect();
            let shape = Shape { samples: &samples, heads: 5, rows: 1, columns: 128 };
            let mut words = vec![0; 25 * 5 * 4];
            match pattern {
                Pattern::Element => element(run, key, shape, t, &mut words)?,
                _ => column(run, key, shape, None, t, &mut words)?,
            }
            drawn += words.chunks_exact(4).len() as u64;
            seen.extend(words.chunks_exact(4).map(|mask| [mask[0], mask[1], mask[2], mask[3]]));
        }
        let test = format!("{pattern:?}: distinct masks of 128 columns, 8 ranks of one seed");
        report.exact(&test, seen.len() as u64, drawn, drawn);
    }
    Ok(())
}

/// The first dropped column of a span's mask, if it keeps `length` columns but for `dropped` in one block, and none beyond.
fn span_start(mask: &[u32], length: usize, dropped: usize) -> Option<usize> {
    let word = mask.iter().position(|&word| word != u32::MAX)?;
    let start = 32 * word + mask[word].trailing_ones() as usize;
    let below = |word: usize, column: usize| ((1u64 << column.saturating_sub(32 * word).min(32)) - 1) as u32;
    let expected = |w: usize| below(w, length) & !(below(w, start + dropped) & !below(w, start));
    let fits = start + dropped <= length && mask.iter().enumerate().all(|(w, &word)| word == expected(w));
    fits.then_some(start)
}

/// Spans drop one block of exactly the rounded length, and it begins anywhere with the same probability. At rate .5 odd
/// lengths are rounded up.
fn spans(run: &Run<'_>, less: u64, report: &mut Report) -> Result<()> {
    report.table("Spans (chi-square of the start)");
    let (mut drawn, mut wrong, mut places) = (0, 0, 0..);
    for (length, rate) in
        [1, 2, 7, 10, 64, 127, 513].into_iter().flat_map(|l| [0.01, 0.1, 0.3, 0.5, 0.9].map(|r| (l, r)))
    {
        let t = threshold(rate)?;
        let dropped = ((t as usize * length + 32768) >> 16).max(1);
        let mut starts = vec![0; length - dropped + 1];
        let columns = length + 9;
        let mut words = vec![0; 128 * 8 * bits::words(columns)];
        for index in places.by_ref().take((SPANS / less / (128 * 8)) as usize) {
            let samples: Vec<u64> = (128 * index..).take(128).collect();
            let shape = Shape { samples: &samples, heads: 8, rows: 1, columns };
            span(run, site(index).key()?, shape, &[length as u32; 128], t, &mut words)?;
            for mask in words.chunks_exact(bits::words(columns)) {
                drawn += 1;
                match span_start(mask, length, dropped) {
                    Some(start) => starts[start] += 1,
                    None => wrong += 1,
                }
            }
        }
        if let places @ 2.. = starts.len() {
            let test = format!("length {length}, rate {rate}: {dropped} dropped, {places} places");
            report.chi_square(&test, &starts, |_| 1.0 / places as f64);
        }
    }
    report.exact("masks that are not one block of the right length", wrong, drawn, 0);
    Ok(())
}

/// Run every test, with so many times less of everything.
fn all(less: u64, brief: bool) -> Result<Report> {
    let run = Run::new()?;
    let mut report = Report { brief, tests: 0, failures: 0 };
    rates(&run, less, &mut report)?;
    scales(&mut report);
    neighbouring_columns(&run, less, &mut report)?;
    lanes(less, &mut report)?;
    correlations(&run, less, &mut report)?;
    distinct(&run, &mut report)?;
    spans(&run, less, &mut report)?;
    let level = run.engine.level().name();
    println!("\nStream {STREAM}, {level}: {} tests, {} failed (|z| > {LIMIT}).", report.tests, report.failures);
    Ok(report)
}

fn main() -> ExitCode {
    let given = |name: &str| std::env::args().any(|argument| argument == name);
    let tested = !given("--bench"); // which `cargo bench` passes, and `cargo test` does not
    match all(if tested || given("--quick") { QUICK } else { 1 }, tested) {
        Ok(report) if report.failures == 0 => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("stats: {error}");
            ExitCode::FAILURE
        }
    }
}
