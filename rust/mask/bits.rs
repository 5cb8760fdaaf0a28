//! Packed bits: bit i of word j is column 32 j + i, rows padded to whole words, tail bits zero.

use crate::error::{Error, Result};
use crate::rng::philox::LANES;

/// Words a row of `columns` takes.
pub const fn words(columns: usize) -> usize {
    columns.div_ceil(32)
}

/// One output word of 16 consecutive counters to 32 mask bits: bit 2 b + h = half h of counter b reaches `threshold`.
#[inline(always)]
pub fn pack(lanes: &[u32; LANES], threshold: u32) -> u32 {
    // half >= t  <=>  half + (65536 - t) carries into bit 16: no comparison, so the compiler vectorises it everywhere.
    let carry = (1 << 16) - threshold;
    let mut pairs = [0u32; LANES];
    for (pair, &x) in pairs.iter_mut().zip(lanes) {
        *pair = ((x & 0xFFFF) + carry) >> 16 | (((x >> 16) + carry) >> 15 & 2);
    }
    pairs.iter().enumerate().fold(0, |word, (b, pair)| word | pair << (2 * b))
}

/// Zero the bits past the last column of a row.
#[inline]
pub fn clear_tail(row: &mut [u32], columns: usize) {
    if let (Some(last), tail @ 1..) = (row.last_mut(), columns % 32) {
        *last &= (1 << tail) - 1;
    }
}

/// Set the bits `from..to` of a row.
pub fn set(row: &mut [u32], from: usize, to: usize) {
    for (j, word) in row.iter_mut().enumerate() {
        let (low, high) = (from.clamp(32 * j, 32 * j + 32) - 32 * j, to.clamp(32 * j, 32 * j + 32) - 32 * j);
        if low < high {
            *word |= (u32::MAX >> (32 - (high - low))) << low;
        }
    }
}

/// Packed rows to one bool a column.
pub fn unpack(packed: &[u32], columns: usize, words_a_row: usize) -> Result<Vec<bool>> {
    if words_a_row != words(columns) {
        return Err(Error::Words { words: words_a_row, columns });
    }
    let rows = packed.len().checked_div(words_a_row).unwrap_or(0);
    let mut keep = Vec::new();
    let total = rows.saturating_mul(columns);
    if keep.try_reserve_exact(total).is_err() {
        return Err(Error::Memory { words: total as u128 / 4 });
    }
    for row in packed.chunks_exact(words_a_row.max(1)) {
        for (j, &word) in row.iter().enumerate() {
            let expanded: [bool; 32] = std::array::from_fn(|i| word >> i & 1 == 1);
            keep.extend_from_slice(&expanded[..(columns - 32 * j).min(32)]);
        }
    }
    Ok(keep)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn clears_only_past_the_last_column() {
        for (columns, expected) in [(1, 1), (31, u32::MAX >> 1), (32, u32::MAX)] {
            let mut row = [u32::MAX];
            clear_tail(&mut row, columns);
            assert_eq!(row[0], expected);
        }
        clear_tail(&mut [], 0);
    }

    proptest! {
        #[test]
        fn packing_compares_halves(lanes: [u32; LANES], threshold in 0..=65536u32) {
            let word = pack(&lanes, threshold);
            for (b, x) in lanes.into_iter().enumerate() {
                prop_assert_eq!(word >> (2 * b) & 1 == 1, x & 0xFFFF >= threshold);
                prop_assert_eq!(word >> (2 * b + 1) & 1 == 1, x >> 16 >= threshold);
            }
        }

        #[test]
        fn set_and_unpack_agree(columns in 1usize..200, a in 0usize..200, b in 0usize..200) {
            let (from, to) = (a.min(b).min(columns), a.max(b).min(columns));
            let mut row = vec![0; words(columns)];
            set(&mut row, from, to);
            let keep = unpack(&row, columns, row.len()).unwrap();
            prop_assert_eq!(keep.len(), columns);
            for (column, kept) in keep.into_iter().enumerate() {
                prop_assert_eq!(kept, (from..to).contains(&column));
            }
        }
    }

    #[test]
    fn unpacking_checks_the_width() {
        assert_eq!(unpack(&[0, 0], 33, 1), Err(Error::Words { words: 1, columns: 33 }));
        assert_eq!(unpack(&[], 0, 0), Ok(vec![]));
    }
}
