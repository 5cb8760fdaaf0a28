//! Whether every path makes the same bits: `cargo bench --bench agreement [-- CASES]`.
//!
//! Random masks of all patterns are drawn on every instruction set, on several numbers of threads, split into parts, as
//! bytes and in a plan, and compared with the portable path on one thread; some bits are compared with the definition,
//! one call of the generator each. Prints what was compared in Markdown; exits with status 1 if a bit differs.

use hiddenkey_rs::mask::plan::{Documents, Entry, Planned, plan};
use hiddenkey_rs::mask::{self, Shape, bits};
use hiddenkey_rs::rng::philox::philox4x32;
use hiddenkey_rs::rng::stream::{MAX_SAMPLE, Pattern, Site, SiteKey};
use hiddenkey_rs::simd::{Engine, Level};
use hiddenkey_rs::threads::Run;
use hiddenkey_rs::{Result, STREAM};
use std::process::ExitCode;

const CASES: u64 = 120_000;
/// Decisions of the largest masks: several pieces of work for several threads.
const LARGEST: f64 = 21.0;
const THREADS: [usize; 4] = [1, 2, 3, 8];

/// SplitMix64: which cases are drawn is fixed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ x >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.roll() % bound as u64) as usize
    }

    /// 1..=2^most, small and large ones alike often.
    fn extent(&mut self, most: f64) -> usize {
        let share = (self.roll() >> 11) as f64 / (1u64 << 53) as f64;
        (share * most.max(0.0)).exp2() as usize
    }

    /// Any number of `bits` bits, the ends more often than others.
    fn corner(&mut self, bits: u32) -> u64 {
        let last = u64::MAX >> (64 - bits);
        match self.below(4) {
            0 => self.roll() & 3 & last,
            1 => last - (self.roll() & 3 & last),
            _ => self.roll() & last,
        }
    }
}

/// One random mask.
struct Case {
    pattern: Pattern,
    site: Site,
    samples: Vec<u64>,
    heads: usize,
    rows: usize,
    columns: usize,
    lengths: Vec<u32>,
    threshold: u32,
}

impl Case {
    fn new(dice: &mut Dice) -> Self {
        let pattern = [Pattern::Element, Pattern::Column, Pattern::Span][dice.below(3)];
        let mut left = dice.extent(LARGEST) as f64;
        let mut share = |dice: &mut Dice, most: f64| {
            let extent = dice.extent(left.log2().min(most));
            left /= extent as f64;
            extent
        };
        let columns = share(dice, 20.0);
        let rows = if pattern == Pattern::Element { share(dice, 20.0) } else { 1 };
        let (heads, count) = (share(dice, 10.0), share(dice, 12.0));
        let site = Site {
            seed: dice.corner(64),
            step: dice.corner(32),
            branch: dice.corner(8),
            layer: dice.corner(10),
            site: dice.roll() % 10,
        };
        Case {
            pattern,
            site,
            samples: (0..count).map(|_| dice.corner(40).min(MAX_SAMPLE)).collect(),
            heads,
            rows,
            columns,
            lengths: (0..count).map(|_| dice.below(columns + 1) as u32).collect(),
            threshold: if dice.below(8) == 0 { dice.corner(16) as u32 + 1 } else { dice.below(65_537) as u32 },
        }
    }

    /// Words of `count` samples.
    fn words(&self, count: usize) -> usize {
        count * self.heads * self.rows * bits::words(self.columns)
    }

    /// The masks of samples `from..to`.
    fn draw(&self, run: &Run<'_>, from: usize, to: usize) -> Result<Vec<u32>> {
        let (key, mut words) = (self.site.key()?, vec![0xDEAD_BEEF; self.words(to - from)]);
        let (samples, lengths) = (&self.samples[from..to], &self.lengths[from..to]);
        let shape = Shape { samples, heads: self.heads, rows: self.rows, columns: self.columns };
        match self.pattern {
            Pattern::Element => mask::element(run, key, shape, self.threshold, &mut words)?,
            Pattern::Column => mask::column(run, key, shape, Some(lengths), self.threshold, &mut words)?,
            Pattern::Span => mask::span(run, key, shape, lengths, self.threshold, &mut words)?,
        }
        Ok(words)
    }

    /// The whole mask another way: an element mask unpacked from packed bits is its bytes; the others' plan is the mask.
    fn otherwise(&self, run: &Run<'_>, expected: &[u32]) -> Result<bool> {
        let columns = self.columns;
        if self.pattern == Pattern::Element {
            let places = self.samples.len() * self.heads * self.rows * columns;
            let (mut bytes, mut unpacked) = (vec![7; places], vec![8; places]);
            let shape = Shape { samples: &self.samples, heads: self.heads, rows: self.rows, columns };
            mask::element_bytes(run, self.site.key()?, shape, self.threshold, &mut bytes)?;
            bits::unpack(run, expected, columns, &mut unpacked)?;
            return Ok(bytes == unpacked);
        }
        let Site { seed, step, branch, layer, site } = self.site;
        let branches = vec![branch; self.samples.len()];
        let documents = Documents { samples: &self.samples, branches: &branches, lengths: &self.lengths, columns };
        let pattern = Planned::of(self.pattern as u64)?;
        let entry = Entry { layer, site, pattern, heads: self.heads, threshold: self.threshold };
        let (mut words, mut counts) = (vec![1; expected.len()], vec![1; self.samples.len() * self.heads]);
        plan(run, (seed, step), &[entry], documents, &mut words, &mut counts)?;
        let mut rows = words.chunks_exact(bits::words(columns)).zip(&counts);
        Ok(words == expected
            && rows.all(|(row, count)| row.iter().map(|word| word.count_ones()).sum::<u32>() == *count))
    }

    /// One place of the mask from the definition.
    fn defined(&self, key: SiteKey, sample: usize, head: usize, row: usize, column: usize) -> bool {
        let (id, length) = (self.samples[sample], self.lengths[sample] as usize);
        let word = |block: usize, word: usize| {
            let c3 = (id >> 32) as u32 | (self.pattern as u32) << 30;
            philox4x32([row as u32 | (head as u32) << 20, block as u32, id as u32, c3], key.0)[word]
        };
        if self.pattern == Pattern::Span {
            let (t, n) = (u64::from(self.threshold), length as u64);
            let dropped = if t == 0 || n == 0 { 0 } else { ((t * n + 32768) >> 16).max(1) };
            let start = (u64::from(word(0, 0)) * (n - dropped + 1)) >> 32;
            return column < length && !(start..start + dropped).contains(&(column as u64));
        }
        let drawn = word(16 * (column / 128) + column % 32 / 2, column % 128 / 32) >> (16 * (column % 2)) & 0xFFFF;
        drawn >= self.threshold && (self.pattern == Pattern::Element || column < length)
    }
}

/// What was compared, and how much of it differed.
#[derive(Default)]
struct Tally {
    bits: u64,
    masks: u64,
    different: u64,
}

impl Tally {
    fn add(&mut self, bits: usize, same: bool) {
        self.bits += bits as u64;
        self.masks += 1;
        self.different += u64::from(!same);
    }
}

const NAMES: [&str; 4] =
    ["instruction sets and threads", "split into parts", "as bytes, or in a plan", "the definition"];

fn compare(cases: u64) -> Result<[Tally; 4]> {
    let engines: Vec<Engine> = Level::ALL.into_iter().filter_map(|level| Engine::new(level).ok()).collect();
    let reference = Run { engine: Engine::new(Level::Portable)?, threads: 1, interrupted: &|| false };
    let mut dice = Dice(1);
    let [mut paths, mut parts, mut forms, mut definition] = <[Tally; 4]>::default();
    for _ in 0..cases {
        let case = Case::new(&mut dice);
        let (count, key) = (case.samples.len(), case.site.key()?);
        let expected = case.draw(&reference, 0, count)?;
        let size = 32 * expected.len();
        for &engine in &engines {
            let run = Run { engine, threads: THREADS[dice.below(4)], ..reference };
            paths.add(size, case.draw(&run, 0, count)? == expected);
        }
        let run = Run { engine: engines[dice.below(engines.len())], threads: THREADS[dice.below(4)], ..reference };
        let cut = dice.below(count + 1);
        let joined = [case.draw(&run, 0, cut)?, case.draw(&run, cut, count)?].concat();
        parts.add(size, joined == expected);
        forms.add(size, case.otherwise(&run, &expected)?);
        for _ in 0..16 {
            let (sample, head) = (dice.below(count), dice.below(case.heads));
            let (row, column) = (dice.below(case.rows), dice.below(case.columns));
            let at = ((sample * case.heads + head) * case.rows + row) * bits::words(case.columns) + column / 32;
            let keep = expected[at] >> (column % 32) & 1 == 1;
            definition.add(1, keep == case.defined(key, sample, head, row, column));
        }
    }
    Ok([paths, parts, forms, definition])
}

fn main() -> ExitCode {
    let cases = std::env::args().filter_map(|argument| argument.parse().ok()).next_back().unwrap_or(CASES);
    let tallies = match compare(cases) {
        Ok(tallies) => tallies,
        Err(error) => {
            eprintln!("agreement: {error}");
            return ExitCode::FAILURE;
        }
    };
    let levels: Vec<&str> = Level::ALL.into_iter().filter(|level| level.available()).map(Level::name).collect();
    println!("Stream {STREAM}: {cases} random masks; instruction sets {}; threads {THREADS:?}.\n", levels.join(", "));
    println!("| compared with the portable path on one thread | masks | bits | different |\n|---|---|---|---|");
    for (name, tally) in NAMES.iter().zip(&tallies) {
        println!("| {name} | {} | {} | {} |", tally.masks, tally.bits, tally.different);
    }
    let total: u64 = tallies.iter().map(|tally| tally.bits).sum();
    let different: u64 = tallies.iter().map(|tally| tally.different).sum();
    println!("\n{total} bits compared, {different} differences.");
    ExitCode::from(u8::from(different > 0))
}
