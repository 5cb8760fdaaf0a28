//! Whole columns, for all rows of a head.

use super::{Shape, bits, check_lengths, element};
use crate::error::Result;
use crate::rng::stream::{Pattern, SiteKey};
use crate::simd::Engine;
use crate::threads::Run;

/// Packed column mask of shape (samples, heads, 1, words); `shape.rows` is taken as 1.
///
/// `lengths`: the samples' real lengths, at most `shape.columns`. Columns past one are 0 and cost nothing.
pub fn column(
    run: &Run<'_>,
    key: SiteKey,
    shape: Shape<'_>,
    lengths: Option<&[u32]>,
    threshold: u32,
    out: &mut [u32],
) -> Result<()> {
    let shape = Shape { rows: 1, ..shape };
    let width = bits::words(shape.columns);
    if let Some(lengths) = lengths {
        check_lengths(shape.samples.len(), lengths, shape.columns)?;
    }
    shape.check(threshold, width, out.len())?;
    let engine = run.engine;
    shape.for_each_row(run, width, out, |index, sample, head, _, words| {
        let length = lengths.map_or(shape.columns, |lengths| lengths[index] as usize);
        draw(engine, key, sample, head, length, threshold, words);
    })
}

/// Draw one head's columns up to `length`; the rest of `words` is zeroed.
#[inline]
pub(super) fn draw(
    engine: Engine,
    key: SiteKey,
    sample: u64,
    head: u32,
    length: usize,
    threshold: u32,
    words: &mut [u32],
) {
    let (real, padding) = words.split_at_mut(bits::words(length));
    element::draw(engine, &key.row(Pattern::Column, sample, head, 0), threshold, length, real);
    padding.fill(0);
}
