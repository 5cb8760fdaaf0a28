//! Masks in use on the CPU: dropout of hidden states straight from the generator, and rows of keys and values that stay,
//! masks of blocks of queries.

mod blocks;
mod columns;
mod element;
mod rows;

pub use blocks::{Bits, Counts, Pairs, Seen, block, seen};
pub use columns::{Kept, Layout, gather, scatter};
pub use element::element;
pub use rows::rows;

use crate::error::{Error, Result, at_most, not_negative};
use crate::rng::stream::{MAX_EXTENT, MAX_SAMPLE};

/// Which mask row each row of hidden states is.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The example's id; -1 is padding, which becomes zero.
    pub samples: &'a [i64],
    /// The token's place in its example, below 2^20.
    pub positions: &'a [i64],
}

impl Rows<'_> {
    /// Check every id and place; returns how many rows there are.
    fn check(&self) -> Result<usize> {
        if self.positions.len() != self.samples.len() {
            return Err(Error::Memory { given: self.positions.len(), wanted: self.samples.len() as u128 });
        }
        for (&sample, &position) in self.samples.iter().zip(self.positions) {
            if sample != -1 {
                at_most("sample", not_negative("sample", sample)?, MAX_SAMPLE)?;
                at_most("position", not_negative("position", position)?, MAX_EXTENT - 1)?;
            }
        }
        Ok(self.samples.len())
    }
}

/// A scale that keeps numbers numbers.
fn check_scale(scale: f32) -> Result<()> {
    if scale.is_finite() && scale > 0.0 { Ok(()) } else { Err(Error::Scale(scale)) }
}

/// `values` must be `rows` rows of equal width; returns the width.
fn width(rows: usize, values: usize, out: usize) -> Result<usize> {
    let width = values.checked_div(rows).unwrap_or(0);
    if rows * width != values {
        return Err(Error::Memory { given: values, wanted: (rows * width) as u128 });
    }
    if values != out {
        return Err(Error::Memory { given: out, wanted: values as u128 });
    }
    Ok(width)
}
