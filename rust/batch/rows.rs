//! Pieces of documents in flat columns: where they stand, and their values.

use crate::error::{Error, Result};
use crate::simd::Engine;
use std::hint::black_box;
use std::ops::Range;

/// The row number of padding: one token that carries no weight.
pub const PADDING: i64 = -1;

/// Integers of either width.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// 32 bits.
    Narrow(&'a [i32]),
    /// 64 bits.
    Wide(&'a [i64]),
}

impl Values<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Values::Narrow(values) => values.len(),
            Values::Wide(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Widen `at` into `out`, of the same length. False if one of them is not in `0..=last`.
    pub(super) fn copy(&self, engine: Engine, at: Range<usize>, last: i64, out: &mut [i64]) -> bool {
        match self {
            Values::Narrow(values) => engine.widen_ids(&values[at], i32::try_from(last).unwrap_or(i32::MAX), out),
            Values::Wide(values) => {
                out.copy_from_slice(&values[at]);
                out.iter().fold(0, |seen, x| seen | x | last.wrapping_sub(*x)) >= 0 // as in `simd::loops::widen_ids`
            }
        }
    }

    /// Bring what the pieces hold nearer, one value of each cache line.
    ///
    /// Nothing waits for the value before, so that dozens of lines are on their way at once. A loop that does its work on
    /// them at the same time keeps a few under way: rows from all over a large store took twice as long.
    pub(super) fn approach(&self, pieces: &[Piece]) {
        for at in pieces.iter().filter_map(Piece::values) {
            match self {
                Values::Narrow(values) => black_box(values[at].iter().step_by(16).fold(0, |seen, x| seen | x)).into(),
                Values::Wide(values) => black_box(values[at].iter().step_by(8).fold(0, |seen, x| seen | x)),
            };
        }
    }
}

/// Where each document stands in the flat values.
#[derive(Debug, Clone, Copy)]
pub struct Documents<'a> {
    /// Document d is `offsets[d]..offsets[d + 1]`.
    pub offsets: &'a [i64],
    /// How many values there are.
    pub values: usize,
}

impl Documents<'_> {
    fn range(&self, row: i64) -> Result<Range<usize>> {
        let rows = self.offsets.len().saturating_sub(1);
        let at = usize::try_from(row).ok().filter(|&at| at < rows).ok_or(Error::Row { row, rows })?;
        let (start, end) = (self.offsets[at], self.offsets[at + 1]);
        if start < 0 || end < start || end > self.values as i64 {
            return Err(Error::Offsets { row, start, end, values: self.values });
        }
        Ok(start as usize..end as usize)
    }

    /// The piece that a row of at most `limit` tokens is.
    fn piece(&self, row: i64, limit: usize) -> Result<Piece> {
        if row == PADDING {
            return Ok(Piece { row, start: 0, length: 1 });
        }
        let range = self.range(row)?;
        Ok(Piece { row, start: range.start, length: range.len().min(limit) })
    }

    /// Rows of at most `limit` tokens.
    pub fn pieces(&self, rows: &[i64], limit: usize) -> Result<Vec<Piece>> {
        rows.iter().map(|&row| self.piece(row, limit)).collect()
    }

    /// Pieces of rows: their starts within the row, and lengths.
    pub fn cut(&self, rows: &[i64], starts: &[i64], lengths: &[i64]) -> Result<Vec<Piece>> {
        if starts.len() != rows.len() || lengths.len() != rows.len() {
            return Err(Error::Memory { given: starts.len().min(lengths.len()), wanted: rows.len() as u128 });
        }
        let cut = |((&row, &start), &length): ((&i64, &i64), &i64)| {
            let range = self.range(row)?;
            let end = start.saturating_add(length);
            if start < 0 || length < 0 || end > range.len() as i64 {
                return Err(Error::Piece { row, start, end, length: range.len() });
            }
            Ok(Piece { row, start: range.start + start as usize, length: length as usize })
        };
        rows.iter().zip(starts).zip(lengths).map(cut).collect()
    }

    /// Of rows of at most `limit` tokens: the longest one's length, and all lengths together.
    pub fn extent(&self, rows: &[i64], limit: usize) -> Result<(usize, usize)> {
        let (mut longest, mut total) = (0, 0);
        for &row in rows {
            let length = self.piece(row, limit)?.length;
            longest = longest.max(length);
            total += length;
        }
        Ok((longest, total))
    }
}

/// A run of a document's tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Piece {
    pub(super) row: i64,
    start: usize,
    pub(super) length: usize,
}

impl Piece {
    /// Where its values stand; `None` for a padding row.
    pub(super) fn values(&self) -> Option<Range<usize>> {
        (self.row != PADDING).then(|| self.start..self.start + self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Rows and offsets of any kind: a piece stands within the values, or the row is named.
        #[test]
        fn pieces_stand_within_the_values(offsets: Vec<i64>, near in prop::collection::vec(-2..14i64, 0..8), row: i64, limit in 0..9usize) {
            for (offsets, values, row) in [(&offsets, 12, row), (&near, 12, row), (&near, 12, row.rem_euclid(9) - 2)] {
                let documents = Documents { offsets, values };
                let found = documents.pieces(&[row], limit);
                prop_assert_eq!(documents.extent(&[row], limit).is_ok(), found.is_ok());
                let at = usize::try_from(row).ok().filter(|at| at + 1 < offsets.len());
                match (found, at) {
                    (Ok(found), _) if row == PADDING => prop_assert_eq!((found[0].values(), found[0].length), (None, 1)),
                    (Ok(found), Some(at)) => {
                        let (start, end) = (offsets[at] as usize, offsets[at + 1] as usize);
                        prop_assert!(start <= end && end <= values);
                        prop_assert_eq!(found[0].values(), Some(start..end.min(start + limit)));
                    }
                    (Err(Error::Offsets { row: named, .. }), Some(at)) => {
                        prop_assert_eq!(named, row);
                        prop_assert!(offsets[at] < 0 || offsets[at + 1] < offsets[at] || offsets[at + 1] > values as i64);
                    }
                    (found, at) => prop_assert_eq!((found, at), (Err(Error::Row { row, rows: offsets.len().saturating_sub(1) }), None)),
                }
            }
        }

        #[test]
        fn cuts_stand_within_their_row(start in -2..6i64, length in -2..6i64, far: i64) {
            let documents = Documents { offsets: &[2, 6], values: 6 };
            for (start, length) in [(start, length), (far, length), (start, far)] {
                let inside = start >= 0 && length >= 0 && i128::from(start) + i128::from(length) <= 4;
                let expected = Piece { row: 0, start: 2 + start.max(0) as usize, length: length.max(0) as usize };
                match documents.cut(&[0], &[start], &[length]) {
                    Ok(found) => prop_assert!(inside && found == [expected]),
                    Err(error) => {
                        let named = matches!(error, Error::Piece { row: 0, .. });
                        prop_assert!(!inside && named);
                    }
                }
            }
        }
    }

    #[test]
    fn lengths_add_up() {
        let documents = Documents { offsets: &[0, 3, 3, 8], values: 8 };
        assert_eq!(documents.extent(&[2, PADDING, 1, 0], 99), Ok((5, 9)));
        assert_eq!(documents.extent(&[2, 0], 4), Ok((4, 7)));
        assert_eq!(documents.extent(&[], 4), Ok((0, 0)));
        assert_eq!(documents.cut(&[0], &[0], &[]), Err(Error::Memory { given: 0, wanted: 1 }));
    }

    #[test]
    fn both_widths_are_copied_and_checked() {
        let engine = Engine::chosen().unwrap();
        for (last, known) in [(5, true), (4, false), (i64::MAX, true)] {
            let mut out = [0; 3];
            assert_eq!(Values::Narrow(&[9, 0, 5, 2]).copy(engine, 1..4, last, &mut out), known);
            assert_eq!(Values::Wide(&[9, 0, 5, 2]).copy(engine, 1..4, last, &mut out), known);
            assert_eq!(out, [0, 5, 2]);
        }
        assert!(!Values::Wide(&[1, -1]).copy(engine, 0..2, i64::MAX, &mut [0; 2]));
    }
}
