//! Masks of a block of queries, as torch's attention kernel adds them to logits: 0 where a pair is kept, else -inf.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result, at_most};
use crate::threads::{PIECE, Run};

/// Of one query: where the first key that it may attend to stands, behind the last one, and how many there are.
/// Without any, (keys, 0, 0).
pub type Seen = [u32; 3];

/// One byte a pair, (examples, heads, queries, keys); an extent of 1 stands for as many as are asked for.
#[derive(Debug, Clone, Copy)]
pub struct Bits<'a> {
    /// The extents.
    pub shape: [usize; 4],
    /// The bytes; what is not 0 is set.
    pub bits: &'a [u8],
}

impl<'a> Bits<'a> {
    fn row(&self, example: usize, head: usize, query: usize) -> &'a [u8] {
        let [examples, heads, queries, keys] = self.shape;
        let row = (example % examples * heads + head % heads) * queries + query % queries;
        &self.bits[row * keys..][..keys]
    }
}

/// Which pairs of queries and keys may attend to each other, and which of those are kept.
#[derive(Debug, Clone, Copy)]
pub struct Pairs<'a> {
    /// The pairs that the model's own mask allows: the same for all heads.
    pub allowed: Bits<'a>,
    /// What [`seen`] found in `allowed`.
    pub seen: &'a [Seen],
    /// The drawn mask.
    pub keep: Bits<'a>,
    /// A query that lost all its keys keeps that of its own place, if it may, and not all that it may attend to.
    pub own: bool,
}

impl Pairs<'_> {
    /// Check everything against everything; returns examples, heads, queries and keys.
    fn extents(&self) -> Result<[usize; 4]> {
        let (allowed, keep) = (self.allowed.shape, self.keep.shape);
        memory(self.allowed.bits.len(), &allowed)?;
        memory(self.keep.bits.len(), &keep)?;
        memory(self.seen.len(), &allowed[..3])?;
        let extents = [allowed[0].max(keep[0]), keep[1], allowed[2], allowed[3]];
        let fits = |given: usize, wanted: usize| memory(if given == 1 { wanted } else { given }, &[wanted]);
        fits(allowed[0], extents[0])?;
        fits(keep[0], extents[0])?;
        fits(keep[2], extents[2])?;
        memory(allowed[1], &[1])?;
        memory(keep[3], &[extents[3]])?;
        Ok(extents)
    }
}

/// How many pairs a block keeps, and how many of its rows see no key at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Pairs.
    pub kept: u64,
    /// Rows of all heads.
    pub empty: u64,
}

/// Find what each query of `allowed`, (n, queries, keys) flattened, may attend to.
pub fn seen(run: &Run<'_>, allowed: &[u8], keys: usize, out: &mut [Seen]) -> Result<()> {
    memory(allowed.len(), &[out.len(), keys])?;
    if allowed.is_empty() {
        out.fill([keys as u32, 0, 0]);
        return Ok(());
    }
    let many = (PIECE / keys).max(1);
    let pieces = out.len().div_ceil(many);
    run.for_each(allowed.chunks(many * keys).zip(out.chunks_mut(many)), pieces, |(allowed, out)| {
        for (row, seen) in allowed.chunks_exact(keys).zip(out) {
            let count = row.iter().map(|&bit| u32::from(bit != 0)).sum();
            let end = row.iter().rposition(|&bit| bit != 0).map_or(0, |last| last + 1);
            let first = row.iter().position(|&bit| bit != 0).unwrap_or(keys);
            *seen = [first as u32, end as u32, count];
        }
    })
}

/// Write the mask of the queries in `rows` over the keys in `columns`, (examples, heads, rows, columns), `forbidden` where
/// a pair is not kept.
///
/// `columns` reach over all that the queries may attend to. A row without any such key is all zeros, and `empty`, (examples,
/// heads, rows), says so: what its attention gives must be replaced.
pub fn block<T: Copy + Default + Send + Sync>(
    run: &Run<'_>,
    pairs: Pairs<'_>,
    (rows, columns): (Range<usize>, Range<usize>),
    forbidden: T,
    out: &mut [T],
    empty: &mut [u8],
) -> Result<Counts> {
    let (block, [examples, heads, ..]) = Block::new(pairs, rows, columns)?;
    let (height, width) = (block.rows.len(), block.columns.len());
    memory(out.len(), &[examples, heads, height, width])?;
    memory(empty.len(), &[examples, heads, height])?;
    let (kept, without) = (AtomicU64::new(0), AtomicU64::new(0));
    let pieces = out.len().div_ceil(PIECE).min(examples * heads);
    // A head is a task even where there are no keys to write: its rows are then all empty.
    let mut rest = out;
    let tasks = empty.chunks_mut(height.max(1)).enumerate().map(|(index, empty)| {
        let (mine, others) = std::mem::take(&mut rest).split_at_mut(height * width);
        rest = others;
        (index / heads, index % heads, mine, empty)
    });
    run.for_each(tasks, pieces, |(example, head, out, empty)| {
        let counts = block.head(example, head, forbidden, out, empty);
        kept.fetch_add(counts.kept, Ordering::Relaxed);
        without.fetch_add(counts.empty, Ordering::Relaxed);
    })?;
    Ok(Counts { kept: kept.into_inner(), empty: without.into_inner() })
}

struct Block<'a> {
    pairs: Pairs<'a>,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl<'a> Block<'a> {
    fn new(pairs: Pairs<'a>, rows: Range<usize>, columns: Range<usize>) -> Result<(Self, [usize; 4])> {
        let extents = pairs.extents()?;
        at_most("end of rows", rows.end as u64, extents[2] as u64)?;
        at_most("start of rows", rows.start as u64, rows.end as u64)?;
        at_most("end of columns", columns.end as u64, extents[3] as u64)?;
        at_most("start of columns", columns.start as u64, columns.end as u64)?;
        for of_example in pairs.seen.chunks_exact(extents[2].max(1)) {
            for &[first, end, _] in of_example[rows.clone()].iter().filter(|seen| seen[2] > 0) {
                at_most("end of the keys seen", u64::from(end), columns.end as u64)?;
                at_most("first key seen", u64::from(first), u64::from(end))?;
                at_most("start of columns", columns.start as u64, u64::from(first))?;
            }
        }
        Ok((Block { pairs, rows, columns }, extents))
    }

    /// One head of one example.
    fn head<T: Copy + Default>(
        &self,
        example: usize,
        head: usize,
        forbidden: T,
        out: &mut [T],
        empty: &mut [u8],
    ) -> Counts {
        let Pairs { allowed, seen, keep, .. } = self.pairs;
        let columns = self.columns.clone();
        let shared = (keep.shape[2] == 1).then(|| Shared::new(&keep.row(example, head, 0)[columns.clone()], forbidden));
        let seen = &seen[example % allowed.shape[0] * allowed.shape[2]..];
        let mut counts = Counts { kept: 0, empty: 0 };
        for (index, empty) in empty.iter_mut().enumerate() {
            let row = self.rows.start + index;
            let out = &mut out[index * columns.len()..][..columns.len()];
            let [first, end, count] = seen[row];
            *empty = u8::from(count == 0);
            if count == 0 {
                out.fill(T::default());
                counts.empty += 1;
                continue;
            }
            let allowed = &allowed.row(example, 0, row)[columns.clone()];
            let kept = match &shared {
                Some(shared) if count == end - first => {
                    shared.copy(first as usize - columns.start..end as usize - columns.start, forbidden, out)
                }
                _ => write(allowed, &keep.row(example, head, row)[columns.clone()], forbidden, out),
            };
            counts.kept += u64::from(if kept > 0 { kept } else { self.rescue(row, allowed, count, forbidden, out) });
        }
        counts
    }

    /// A row that lost all its keys: its own one, or all that it may attend to. Returns how many.
    fn rescue<T: Copy + Default>(&self, row: usize, allowed: &[u8], count: u32, forbidden: T, out: &mut [T]) -> u32 {
        let mine =
            row.checked_sub(self.columns.start).filter(|&column| allowed.get(column).is_some_and(|&bit| bit != 0));
        match mine.filter(|_| self.pairs.own) {
            Some(column) => {
                out.fill(forbidden);
                out[column] = T::default();
                1
            }
            None => {
                write(allowed, allowed, forbidden, out);
                count
            }
        }
    }
}

/// What all rows of a head have in common: the mask of a query that may attend to all keys, and how many are kept before each.
struct Shared<T> {
    mask: Vec<T>,
    before: Vec<u32>,
}

impl<T: Copy + Default> Shared<T> {
    fn new(keep: &[u8], forbidden: T) -> Self {
        let mut before = Vec::with_capacity(keep.len() + 1);
        before.push(0);
        before.extend(keep.iter().scan(0, |count, &bit| {
            *count += u32::from(bit != 0);
            Some(*count)
        }));
        Shared { mask: keep.iter().map(|&bit| if bit != 0 { T::default() } else { forbidden }).collect(), before }
    }

    /// The row of a query that may attend to the keys in `run`; returns how many are kept. Most masks are such runs, and
    /// a copy is several times as fast as a decision a pair.
    fn copy(&self, run: Range<usize>, forbidden: T, out: &mut [T]) -> u32 {
        out[..run.start].fill(forbidden);
        out[run.clone()].copy_from_slice(&self.mask[run.clone()]);
        out[run.end..].fill(forbidden);
        self.before[run.end] - self.before[run.start]
    }
}

/// One row; returns how many keys are both allowed and kept.
fn write<T: Copy + Default>(allowed: &[u8], keep: &[u8], forbidden: T, out: &mut [T]) -> u32 {
    let mut kept = 0;
    for ((&allowed, &keep), out) in allowed.iter().zip(keep).zip(out) {
        let stays = allowed != 0 && keep != 0;
        kept += u32::from(stays);
        *out = if stays { T::default() } else { forbidden };
    }
    kept
}

fn memory(given: usize, extents: &[usize]) -> Result<()> {
    let wanted = extents.iter().fold(1u128, |all, &extent| all.saturating_mul(extent as u128));
    if given as u128 == wanted { Ok(()) } else { Err(Error::Memory { given, wanted }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A mask from the definition: whether a pair stays, and whether its query sees any key.
    fn stays(pairs: &Pairs<'_>, [example, head, query, key]: [usize; 4]) -> (bool, bool) {
        let allowed = pairs.allowed.row(example, 0, query);
        let keep = pairs.keep.row(example, head, query);
        let sees = allowed.iter().any(|&bit| bit != 0);
        let kept = |key: usize| allowed[key] != 0 && keep[key] != 0;
        let rescued =
            if pairs.own && allowed.get(query).is_some_and(|&bit| bit != 0) { key == query } else { allowed[key] != 0 };
        (if (0..allowed.len()).any(kept) { kept(key) } else { rescued || !sees }, sees)
    }

    fn bits(shape: [usize; 4], from: &[u8]) -> Vec<u8> {
        (0..shape.iter().product()).map(|i| from[i % from.len()]).collect()
    }

    proptest! {
        #[test]
        fn is_the_definition(
            (shape, which) in any::<[bool; 3]>().prop_flat_map(|which| ([1usize..4, 1..4, 1..9, 1..9], Just(which))),
            (runs, own) in any::<(bool, bool)>(),
            allowed in proptest::collection::vec(prop_oneof![1 => Just(0u8), 2 => 1u8..3], 1..400),
            keep in proptest::collection::vec(0u8..2, 1..400),
            cut in (0usize..9, 0usize..9)
        ) {
            let run = Run::new().unwrap();
            let [examples, heads, queries, keys] = shape;
            let of_allowed = [if which[0] { examples } else { 1 }, 1, queries, keys];
            let mut allowed = bits(of_allowed, &allowed);
            if runs { // one run of keys a query, somewhere
                for (row, bits) in allowed.chunks_mut(keys).enumerate() {
                    let (first, end) = (row * 3 % keys, row * 5 % (keys + 1));
                    bits.iter_mut().enumerate().for_each(|(key, bit)| *bit = u8::from((first..end).contains(&key)));
                }
            }
            let of_keep = [if which[1] { examples } else { 1 }, heads, if which[2] { queries } else { 1 }, keys];
            let keep = bits(of_keep, &keep);
            let mut found = vec![[9; 3]; of_allowed[0] * queries];
            seen(&run, &allowed, keys, &mut found).unwrap();
            let pairs = Pairs {
                allowed: Bits { shape: of_allowed, bits: &allowed },
                seen: &found,
                keep: Bits { shape: of_keep, bits: &keep },
                own,
            };
            let examples = of_allowed[0].max(of_keep[0]);
            let (start, end) = (cut.0.min(cut.1).min(queries), cut.0.max(cut.1).min(queries));
            let rows = found.chunks(queries).flat_map(|of_example| &of_example[start..end]);
            let first = rows.clone().map(|seen| seen[0] as usize).min().unwrap_or(0);
            let last = rows.map(|seen| seen[1] as usize).max().unwrap_or(0).max(first);
            let mut out = vec![7u16; examples * heads * (end - start) * (last - first)];
            let mut empty = vec![7; examples * heads * (end - start)];
            let counts = block(&run, pairs, (start..end, first..last), 5, &mut out, &mut empty).unwrap();
            let (mut out, mut empty, mut expected) = (out.iter(), empty.iter(), Counts { kept: 0, empty: 0 });
            for (example, head, query) in (0..examples)
                .flat_map(|e| (0..heads).flat_map(move |h| (start..end).map(move |q| (e, h, q))))
            {
                let row = |key| stays(&pairs, [example, head, query, key]);
                let (_, sees) = row(0);
                prop_assert_eq!(*empty.next().unwrap(), u8::from(!sees));
                expected.empty += u64::from(!sees);
                for key in 0..keys {
                    expected.kept += u64::from(sees && row(key).0);
                    if (first..last).contains(&key) {
                        prop_assert_eq!(*out.next().unwrap(), if row(key).0 { 0 } else { 5 });
                    } else {
                        prop_assert!(!sees || !row(key).0, "a kept key lies outside the columns");
                    }
                }
            }
            prop_assert_eq!(counts, expected);
        }
    }

    #[test]
    fn bad_input_is_refused() {
        let run = Run::new().unwrap();
        let attempt = |allowed: [usize; 4], keep: [usize; 4], seen: Seen, rows, columns, out: usize, empty: usize| {
            let (one, other) = (bits(allowed, &[1]), bits(keep, &[1]));
            let pairs = Pairs {
                allowed: Bits { shape: allowed, bits: &one },
                seen: &[seen; 2],
                keep: Bits { shape: keep, bits: &other },
                own: true,
            };
            block(&run, pairs, (rows, columns), 1u32, &mut vec![0; out], &mut vec![0; empty]).unwrap_err().to_string()
        };
        let (allowed, keep, seen) = ([1, 1, 2, 3], [2, 2, 1, 3], [0, 3, 3]);
        assert!(attempt(allowed, keep, seen, 0..3, 0..3, 1, 1).starts_with("end of rows must lie in 0..=2 (got 3)"));
        assert!(attempt(allowed, keep, seen, 0..2, 0..4, 1, 1).starts_with("end of columns must lie in 0..=3 (got 4)"));
        assert!(attempt(allowed, keep, seen, 0..2, 0..2, 1, 1).starts_with("end of the keys seen must lie in 0..=2"));
        assert!(
            attempt(allowed, keep, seen, 0..2, 1..3, 1, 1).starts_with("start of columns must lie in 0..=0 (got 1)")
        );
        assert!(attempt(allowed, keep, [3, 2, 1], 0..2, 0..3, 1, 1).starts_with("first key seen must lie in 0..=2"));
        assert!(attempt(allowed, keep, seen, 0..2, 0..3, 23, 8).contains("got room for 23 places, not 24"));
        assert!(attempt(allowed, keep, seen, 0..2, 0..3, 24, 7).contains("got room for 7 places, not 8"));
        assert!(attempt(allowed, [2, 2, 1, 4], seen, 0..2, 0..3, 24, 8).contains("got room for 4 places, not 3"));
        assert!(attempt([1, 2, 1, 3], keep, seen, 0..1, 0..3, 12, 4).contains("got room for 2 places, not 1"));
        assert!(attempt(allowed, [2, 2, 3, 3], seen, 0..2, 0..3, 24, 8).contains("got room for 3 places, not 2"));
        assert!(attempt([2, 1, 1, 3], [3, 1, 1, 3], seen, 0..1, 0..3, 9, 3).contains("got room for 2 places, not 3"));
        let empty = super::seen(&run, &[1; 5], 3, &mut [[0; 3]; 2]).unwrap_err().to_string();
        assert!(empty.contains("got room for 5 places, not 6"));
    }
}
