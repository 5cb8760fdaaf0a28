//! Packed bits: bit i of word j is column 32 j + i, rows padded to whole words, tail bits zero.

use crate::error::{Error, Result};
use crate::threads::{PIECE, Run};

/// Words a row of `columns` takes.
pub const fn words(columns: usize) -> usize {
    columns.div_ceil(32)
}

/// Zero the bits from column `from` to the row's end.
#[inline]
pub fn clear_from(row: &mut [u32], from: usize) {
    let end = 32 * row.len();
    clear(row, from, end);
}

/// Zero the bits of columns `from..to`.
#[inline]
pub fn clear(row: &mut [u32], from: usize, to: usize) {
    if from >= to {
        return;
    }
    let (first, last) = (from / 32, (to - 1) / 32);
    let below = (1 << (from % 32)) - 1;
    let above = !(u32::MAX >> (31 - (to - 1) % 32));
    if first == last {
        row[first] &= below | above;
        return;
    }
    row[first] &= below;
    row[first + 1..last].fill(0);
    row[last] &= above;
}

/// Packed rows of `columns` to one byte, 0 or 1, a column.
pub fn unpack(run: &Run<'_>, packed: &[u32], columns: usize, out: &mut [u8]) -> Result<()> {
    let width = words(columns);
    let rows = packed.len().checked_div(width).unwrap_or(0);
    if rows * width != packed.len() || rows * columns != out.len() {
        return Err(Error::Words { words: packed.len(), columns, given: out.len() });
    }
    if out.is_empty() {
        return Ok(());
    }
    let rows = (PIECE / columns).max(1);
    let engine = run.engine;
    let pieces = out.len().div_ceil(rows * columns);
    run.for_each(packed.chunks(rows * width).zip(out.chunks_mut(rows * columns)), pieces, |(packed, out)| {
        for (words, bytes) in packed.chunks_exact(width).zip(out.chunks_exact_mut(columns)) {
            engine.unpack(words, bytes);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn clears_its_range_and_nothing_else(count in 0usize..7, a in 0usize..224, b in 0usize..224) {
            let bound = 32 * count;
            let (from, to) = (a.min(b).min(bound), a.max(b).min(bound));
            let mut row = vec![u32::MAX; count];
            clear(&mut row, from, to);
            for column in 0..bound {
                prop_assert_eq!(row[column / 32] >> (column % 32) & 1 == 0, (from..to).contains(&column));
            }
            let mut row = vec![u32::MAX; count];
            clear_from(&mut row, from);
            for column in 0..bound {
                prop_assert_eq!(row[column / 32] >> (column % 32) & 1 == 0, column >= from);
            }
        }
    }

    #[test]
    fn unpacking_checks_the_width() {
        let run = Run::new().unwrap();
        let wrong = unpack(&run, &[0, 0, 0], 33, &mut [0; 33]);
        assert_eq!(wrong, Err(Error::Words { words: 3, columns: 33, given: 33 }));
        assert!(unpack(&run, &[0, 0], 33, &mut [0; 34]).is_err());
        assert_eq!(unpack(&run, &[], 0, &mut []), Ok(()));
    }
}
