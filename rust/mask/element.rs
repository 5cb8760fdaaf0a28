//! Every (row, column) dropped on its own.

use super::threshold::LEVELS;
use super::{Shape, bits};
use crate::error::Result;
use crate::rng::philox::Row;
use crate::rng::stream::{Pattern, SiteKey, TILE};
use crate::simd::Engine;
use crate::threads::Run;

/// Packed element mask of shape (samples, heads, rows, words).
pub fn element(run: &Run<'_>, key: SiteKey, shape: Shape<'_>, threshold: u32, out: &mut [u32]) -> Result<()> {
    let width = bits::words(shape.columns);
    shape.check(threshold, width, out.len())?;
    let engine = run.engine;
    shape.for_each_row(run, width, out, |_, sample, head, row, words| {
        draw(engine, &key.row(Pattern::Element, sample, head, row), threshold, shape.columns, words);
    })
}

/// The same mask with one byte, 0 or 1, a decision: shape (samples, heads, rows, columns).
pub fn element_bytes(run: &Run<'_>, key: SiteKey, shape: Shape<'_>, threshold: u32, out: &mut [u8]) -> Result<()> {
    shape.check(threshold, shape.columns, out.len())?;
    let engine = run.engine;
    shape.for_each_row(run, shape.columns, out, |_, sample, head, row, bytes| {
        let counters = key.row(Pattern::Element, sample, head, row);
        for_each_block(engine, &counters, threshold, bytes, |words, bytes| engine.unpack(words, bytes));
    })
}

/// Draw the packed bits of one row of `columns`; bits past the last column are zero.
#[inline]
pub(crate) fn draw(engine: Engine, counters: &Row, threshold: u32, columns: usize, words: &mut [u32]) {
    draw_from(engine, counters, 0, threshold, words);
    bits::clear_from(words, columns);
}

#[inline]
fn draw_from(engine: Engine, counters: &Row, tile: usize, threshold: u32, words: &mut [u32]) {
    match threshold {
        0 => words.fill(u32::MAX),
        LEVELS.. => words.fill(0),
        _ => engine.fill(counters, tile, threshold as u16, words),
    }
}

/// Columns whose bits stay in the first-level cache between being drawn and being used.
const BLOCK: usize = 2048;

/// Call `work(bits, places)` for one block of a row's columns after the other; the bits exist no longer than that.
#[inline]
pub(crate) fn for_each_block<T>(
    engine: Engine,
    counters: &Row,
    threshold: u32,
    places: &mut [T],
    mut work: impl FnMut(&[u32], &mut [T]),
) {
    let mut words = [0; BLOCK / 32];
    for (block, places) in places.chunks_mut(BLOCK).enumerate() {
        let words = &mut words[..bits::words(places.len())];
        draw_from(engine, counters, block * (BLOCK / TILE), threshold, words);
        bits::clear_from(words, places.len());
        work(words, places);
    }
}
