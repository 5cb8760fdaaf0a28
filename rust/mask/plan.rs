//! A step ahead: the column and span masks of every layer, and how many columns each head keeps.

use super::{bits, check_lengths, check_samples, column, span, threshold::LEVELS};
use crate::error::{Error, Result, at_most};
use crate::rng::stream::{MAX_BRANCH, MAX_EXTENT, MAX_HEADS, Pattern, Site};
use crate::simd::Engine;
use crate::threads::{PIECE, Run};

/// A pattern that is planned: element masks are made where they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planned {
    /// Whole columns.
    Column,
    /// One block of columns.
    Span,
}

impl Planned {
    /// The pattern of a tag in the counter.
    pub fn of(code: u64) -> Result<Self> {
        match code {
            code if code == Pattern::Column as u64 => Ok(Planned::Column),
            code if code == Pattern::Span as u64 => Ok(Planned::Span),
            code => Err(Error::Pattern(code)),
        }
    }
}

/// One site of one layer.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The layer within its stack.
    pub layer: u64,
    /// The code of the place in the layer.
    pub site: u64,
    /// What is drawn.
    pub pattern: Planned,
    /// Heads, at most 2^10.
    pub heads: usize,
    /// The rate's threshold, 0..=65536.
    pub threshold: u32,
}

/// The documents of a batch: one for each example and branch.
#[derive(Debug, Clone, Copy)]
pub struct Documents<'a> {
    /// Sample ids, below 2^40.
    pub samples: &'a [u64],
    /// The pass of a two-pass loss that each belongs to, below 2^8. Equal ones together cost least.
    pub branches: &'a [u64],
    /// Real lengths, at most `columns`.
    pub lengths: &'a [u32],
    /// Columns of every mask, at most 2^20.
    pub columns: usize,
}

impl Documents<'_> {
    fn check(&self) -> Result<()> {
        at_most("columns", self.columns as u64, MAX_EXTENT)?;
        check_samples(self.samples)?;
        check_lengths(self.samples.len(), self.lengths, self.columns)?;
        at_most("branch", self.branches.iter().copied().max().unwrap_or(0), MAX_BRANCH)?;
        match self.branches.len() {
            given if given == self.samples.len() => Ok(()),
            given => Err(Error::Memory { given, wanted: self.samples.len() as u128 }),
        }
    }
}

/// Draw every entry's mask, (documents, heads, words), one entry behind the other, and count what each head keeps.
///
/// Columns past a document's length are 0. Equals [`column()`](super::column()) and [`span()`](super::span()) to the bit.
pub fn plan(
    run: &Run<'_>,
    (seed, step): (u64, u64),
    entries: &[Entry],
    documents: Documents<'_>,
    words: &mut [u32],
    counts: &mut [u32],
) -> Result<()> {
    documents.check()?;
    let width = bits::words(documents.columns);
    let mut heads = 0u128;
    for entry in entries {
        at_most("heads", entry.heads as u64, MAX_HEADS)?;
        at_most("threshold", u64::from(entry.threshold), u64::from(LEVELS))?;
        Site { seed, step, branch: 0, layer: entry.layer, site: entry.site }.key()?;
        heads += entry.heads as u128;
    }
    let rows = heads * documents.samples.len() as u128;
    for (given, wanted) in [(words.len(), rows * width as u128), (counts.len(), rows)] {
        if given as u128 != wanted {
            return Err(Error::Memory { given, wanted });
        }
    }
    let many = (PIECE / documents.columns.max(1)).max(1);
    let decisions = 32 * words.len(); // a layer's mask is often too small to wake anybody for
    let (mut words, mut counts) = (words, counts);
    let mut tasks = Vec::with_capacity(entries.len());
    for entry in entries {
        let rows = entry.heads * documents.samples.len();
        for first in (0..rows).step_by(many) {
            let rows = many.min(rows - first);
            let (mine, rest) = std::mem::take(&mut words).split_at_mut(rows * width);
            let (kept, others) = std::mem::take(&mut counts).split_at_mut(rows);
            tasks.push((entry, first, mine, kept));
            (words, counts) = (rest, others);
        }
    }
    let (engine, pieces) = (run.engine, decisions.div_ceil(PIECE).min(tasks.len()));
    run.for_each(tasks.into_iter(), pieces, |(entry, first, words, counts)| {
        draw(engine, (seed, step), entry, documents, first, words, counts);
    })
}

/// Draw some of an entry's rows, the first of which is row `first`: head `first % heads` of document `first / heads`.
fn draw(
    engine: Engine,
    (seed, step): (u64, u64),
    entry: &Entry,
    documents: Documents<'_>,
    first: usize,
    words: &mut [u32],
    counts: &mut [u32],
) {
    let width = bits::words(documents.columns);
    let derive = |branch| Site { seed, step, branch, layer: entry.layer, site: entry.site }.key();
    let mut branch = None;
    for (index, count) in counts.iter_mut().enumerate() {
        let (document, head) = ((first + index) / entry.heads, ((first + index) % entry.heads) as u32);
        // A key costs four generator calls: one for every run of a branch.
        let wanted = documents.branches[document];
        if branch.is_none_or(|(current, _)| current != wanted) {
            branch = derive(wanted).ok().map(|key| (wanted, key));
        }
        let Some((_, key)) = branch else { continue };
        let (sample, length) = (documents.samples[document], documents.lengths[document]);
        let bits = &mut words[index * width..(index + 1) * width];
        match entry.pattern {
            Planned::Span => span::draw(key, sample, head, length, entry.threshold, bits),
            Planned::Column => column::draw(engine, key, sample, head, length as usize, entry.threshold, bits),
        }
        *count = engine.count(bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::Shape;

    #[test]
    fn a_plan_is_its_masks() {
        let run = Run::new().unwrap();
        let documents =
            Documents { samples: &[9, 4, 9, 4], branches: &[0, 0, 1, 1], lengths: &[70, 33, 70, 0], columns: 70 };
        let entry = |layer, pattern, heads| Entry { layer, site: layer % 2, pattern, heads, threshold: 20_000 };
        let entries = [entry(0, Planned::Column, 3), entry(1, Planned::Span, 1), entry(7, Planned::Column, 2)];
        let (mut words, mut counts) = (vec![0xCDCD; 4 * 6 * 3], vec![9; 4 * 6]);
        plan(&run, (3, 5), &entries, documents, &mut words, &mut counts).unwrap();
        let mut at = 0;
        for entry in entries {
            for index in 0..4 {
                let site = Site { seed: 3, step: 5, branch: index as u64 / 2, layer: entry.layer, site: entry.site };
                let key = site.key().unwrap();
                let shape =
                    Shape { samples: &documents.samples[index..=index], heads: entry.heads, rows: 1, columns: 70 };
                let lengths = &documents.lengths[index..=index];
                let mut expected = vec![0; 3 * entry.heads];
                if entry.pattern == Planned::Span {
                    super::super::span(&run, key, shape, lengths, 20_000, &mut expected).unwrap();
                } else {
                    super::super::column(&run, key, shape, Some(lengths), 20_000, &mut expected).unwrap();
                }
                for (row, bits) in expected.chunks(3).enumerate() {
                    assert_eq!(&words[3 * (at + row)..3 * (at + row + 1)], bits);
                    assert_eq!(counts[at + row], bits.iter().map(|w| w.count_ones()).sum::<u32>());
                }
                at += entry.heads;
            }
        }
        assert_eq!(at, counts.len());
    }

    #[test]
    fn bad_input_is_refused_before_anything_is_written() {
        let run = Run::new().unwrap();
        let good = Documents { samples: &[1], branches: &[0], lengths: &[3], columns: 3 };
        let entry = Entry { layer: 0, site: 0, pattern: Planned::Column, heads: 1, threshold: 1 };
        let mut words = [7];
        let mut attempt =
            |entry, documents| plan(&run, (0, 0), &[entry], documents, &mut words, &mut [0]).unwrap_err().to_string();
        assert!(attempt(Entry { layer: 1024, ..entry }, good).starts_with("layer must lie in 0..=1023 (got 1024)"));
        assert!(attempt(Entry { threshold: 65_537, ..entry }, good).contains("got 65537"));
        assert!(attempt(Entry { heads: 2, ..entry }, good).contains("got room for 1"));
        assert!(attempt(entry, Documents { branches: &[256], ..good }).starts_with("branch"));
        assert!(attempt(entry, Documents { branches: &[], ..good }).contains("got room for 0"));
        assert!(attempt(entry, Documents { lengths: &[4], ..good }).starts_with("length must lie in 0..=3 (got 4)"));
        assert!(attempt(entry, Documents { samples: &[1 << 40], ..good }).starts_with("sample"));
        assert_eq!(words, [7]);
    }
}
