//! Every (row, column) dropped on its own.

use super::{Shape, bits};
use crate::error::Result;
use crate::rng::philox::Row;
use crate::rng::stream::{Pattern, SiteKey, TILE};

/// Packed element mask of shape (samples, heads, rows, words).
pub fn element(key: SiteKey, shape: Shape<'_>, threshold: u32) -> Result<Vec<u32>> {
    let mut words = shape.allocate(threshold)?;
    shape.for_each_row(&mut words, |_, sample, head, row, out| {
        fill(&key.row(Pattern::Element, sample, head, row), shape.columns, threshold, out);
    });
    Ok(words)
}

/// Draw one row: a tile of 16 counters gives 128 columns, one output word 32 of them.
#[inline]
pub(super) fn fill(counters: &Row, columns: usize, threshold: u32, out: &mut [u32]) {
    for (tile, words) in out.chunks_mut(TILE / 32).enumerate() {
        let outputs = counters.blocks((16 * tile) as u32);
        for (word, lanes) in words.iter_mut().zip(&outputs) {
            *word = bits::pack(lanes, threshold);
        }
    }
    bits::clear_tail(out, columns);
}
