//! Whole columns, for all rows of a head.

use super::{Shape, element::fill};
use crate::error::Result;
use crate::rng::stream::{Pattern, SiteKey};

/// Packed column mask of shape (samples, heads, 1, words); `shape.rows` is taken as 1.
pub fn column(key: SiteKey, shape: Shape<'_>, threshold: u32) -> Result<Vec<u32>> {
    let shape = Shape { rows: 1, ..shape };
    let mut words = shape.allocate(threshold)?;
    shape.for_each_row(&mut words, |_, sample, head, _, out| {
        fill(&key.row(Pattern::Column, sample, head, 0), shape.columns, threshold, out);
    });
    Ok(words)
}
