//! One contiguous block of columns, for all rows of a head.

use super::{Shape, bits, check_lengths};
use crate::error::Result;
use crate::rng::stream::SiteKey;
use crate::threads::Run;

/// Packed span mask of shape (samples, heads, 1, words); `shape.rows` is taken as 1.
///
/// `lengths` are the samples' real lengths, at most `shape.columns`. Columns past a length are 0: there is nothing to keep.
pub fn span(
    run: &Run<'_>,
    key: SiteKey,
    shape: Shape<'_>,
    lengths: &[u32],
    threshold: u32,
    out: &mut [u32],
) -> Result<()> {
    let shape = Shape { rows: 1, ..shape };
    let width = bits::words(shape.columns);
    check_lengths(shape.samples.len(), lengths, shape.columns)?;
    shape.check(threshold, width, out.len())?;
    shape.for_each_row(run, width, out, |index, sample, head, _, words| {
        draw(key, sample, head, lengths[index], threshold, words);
    })
}

/// Draw one head's block.
#[inline]
pub(super) fn draw(key: SiteKey, sample: u64, head: u32, length: u32, threshold: u32, words: &mut [u32]) {
    let dropped = dropped(length, threshold);
    let start = start(key.span_draw(sample, head), length, dropped) as usize;
    words.fill(u32::MAX);
    bits::clear(words, start, start + dropped as usize);
    bits::clear_from(words, length as usize);
}

/// How many columns a span drops of `length`.
pub fn dropped(length: u32, threshold: u32) -> u32 {
    if threshold == 0 || length == 0 {
        return 0;
    }
    let rounded = (u64::from(threshold) * u64::from(length) + 32768) >> 16;
    (rounded as u32).clamp(1, length)
}

/// Where a span of `dropped` columns begins: uniform over the places where all of it fits.
pub fn start(draw: u32, length: u32, dropped: u32) -> u32 {
    ((u64::from(draw) * u64::from(length - dropped + 1)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_spans() {
        for (length, threshold, expected) in
            [(10, 0, 0), (0, 6554, 0), (1, 1, 1), (10, 6554, 1), (15, 6554, 2), (14, 6554, 1)]
        {
            assert_eq!(dropped(length, threshold), expected, "{length} {threshold}");
        }
        assert_eq!(dropped(7, 65536), 7);
    }

    #[test]
    fn starts_reach_both_ends() {
        assert_eq!(start(0, 10, 3), 0);
        assert_eq!(start(u32::MAX, 10, 3), 7);
        assert_eq!(start(u32::MAX, 10, 10), 0);
    }
}
