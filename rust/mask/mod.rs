//! Masks: packed bits of the three patterns. 1 = keep. `bits` knows packing and no pattern, a pattern no packing.

pub mod bits;
pub mod column;
pub mod element;
pub mod span;
pub mod threshold;

pub use column::column;
pub use element::element;
pub use span::span;

use crate::error::{Error, Result, at_most};
use crate::rng::stream::{MAX_EXTENT, MAX_HEADS, MAX_SAMPLE};

/// The shape of a mask: (samples, heads, rows, columns).
#[derive(Debug, Clone, Copy)]
pub struct Shape<'a> {
    /// Sample ids, below 2^40.
    pub samples: &'a [u64],
    /// Heads, at most 2^10.
    pub heads: usize,
    /// Rows, at most 2^20.
    pub rows: usize,
    /// Columns, at most 2^20.
    pub columns: usize,
}

impl Shape<'_> {
    /// Check every limit and allocate the packed words, all zero.
    fn allocate(&self, threshold: u32) -> Result<Vec<u32>> {
        at_most("threshold", u64::from(threshold), u64::from(threshold::LEVELS))?;
        at_most("heads", self.heads as u64, MAX_HEADS)?;
        at_most("rows", self.rows as u64, MAX_EXTENT)?;
        at_most("columns", self.columns as u64, MAX_EXTENT)?;
        for &sample in self.samples {
            at_most("sample", sample, MAX_SAMPLE)?;
        }
        let extents = [self.samples.len(), self.heads, self.rows, bits::words(self.columns)];
        let total = extents.iter().fold(1u128, |product, &extent| product.saturating_mul(extent as u128));
        let mut words = Vec::new();
        let fits = usize::try_from(total).is_ok_and(|count| words.try_reserve_exact(count).is_ok());
        if !fits {
            return Err(Error::Memory { words: total });
        }
        words.resize(total as usize, 0);
        Ok(words)
    }

    /// Call `fill(sample index, sample, head, row, words of the row)` for every row, in memory order.
    fn for_each_row(&self, words: &mut [u32], mut fill: impl FnMut(usize, u64, u32, u32, &mut [u32])) {
        let width = bits::words(self.columns);
        if width == 0 {
            return;
        }
        for (index, row) in words.chunks_exact_mut(width).enumerate() {
            let (outer, r) = (index / self.rows, index % self.rows);
            let (sample, head) = (outer / self.heads, outer % self.heads);
            fill(sample, self.samples[sample], head as u32, r as u32, row);
        }
    }
}

/// The lines of a vector file, split at blanks; comments and empty lines left out.
#[cfg(test)]
pub(crate) fn vectors(name: &str) -> Vec<Vec<String>> {
    let path = format!("{}/tests/vectors/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    lines.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::stream::Site;

    /// Every mask vector, from the same file that the NumPy and torch implementations read.
    #[test]
    fn mask_vectors() {
        let mut seen = 0;
        for line in vectors("masks.txt") {
            let n = |i: usize| line[i].parse::<u64>().unwrap();
            let site = Site { seed: n(1), step: n(2), branch: n(3), layer: n(4), site: n(5) };
            let key = site.key().unwrap();
            let list = |i: usize| line[i].split(',').map(|w| w.parse::<u64>().unwrap()).collect::<Vec<_>>();
            let (samples, threshold) = (list(6), n(10) as u32);
            let (heads, rows, columns) = (n(7) as usize, n(8) as usize, n(9) as usize);
            let shape = Shape { samples: &samples, heads, rows, columns };
            let words = match line[0].as_str() {
                "element" => element(key, shape, threshold),
                "column" => column(key, shape, threshold),
                _ => {
                    let lengths: Vec<u32> = list(11).into_iter().map(|l| l as u32).collect();
                    span(key, shape, &lengths, threshold)
                }
            };
            let hex: String = words.unwrap().iter().map(|w| format!("{w:08x}")).collect();
            assert_eq!(&hex, line.last().unwrap(), "{line:?}");
            seen += 1;
        }
        assert!(seen >= 50, "the vector file is empty");
    }

    #[test]
    fn limits_are_errors_and_empty_masks_are_not() {
        let key = Site { seed: 0, step: 0, branch: 0, layer: 0, site: 0 }.key().unwrap();
        let shape = Shape { samples: &[1], heads: 1, rows: 1, columns: 1 };
        assert!(element(key, Shape { columns: (1 << 20) + 1, ..shape }, 1).is_err());
        assert!(element(key, Shape { rows: (1 << 20) + 1, ..shape }, 1).is_err());
        assert!(element(key, Shape { heads: (1 << 10) + 1, ..shape }, 1).is_err());
        assert!(element(key, Shape { samples: &[1 << 40], ..shape }, 1).is_err());
        assert!(element(key, shape, 65537).is_err());
        let huge = Shape { heads: 1 << 10, rows: 1 << 20, columns: 1 << 20, samples: &[0; 1 << 12] };
        assert!(matches!(element(key, huge, 1), Err(Error::Memory { .. })));
        for empty in [
            Shape { samples: &[], ..shape },
            Shape { heads: 0, ..shape },
            Shape { rows: 0, ..shape },
            Shape { columns: 0, ..shape },
        ] {
            assert_eq!(element(key, empty, 1), Ok(vec![]));
        }
    }
}
