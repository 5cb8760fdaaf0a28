//! Masks: packed bits of the three patterns. 1 = keep. `bits` knows packing and no pattern, a pattern no packing.
//!
//! Nothing here allocates a mask: callers hand in the memory, and learn what is wrong before any of it is written.

pub mod bits;
pub mod column;
pub mod element;
#[cfg(test)]
mod frozen;
pub mod plan;
pub mod span;
pub mod threshold;

pub use column::column;
pub use element::{element, element_bytes};
pub use span::span;

use crate::error::{Error, Result, at_most};
use crate::rng::stream::{MAX_EXTENT, MAX_HEADS, MAX_SAMPLE};
use crate::threads::{PIECE, Run};

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
    /// Check every limit, and that `given` places of memory are `width` for each row.
    fn check(&self, threshold: u32, width: usize, given: usize) -> Result<()> {
        at_most("threshold", u64::from(threshold), u64::from(threshold::LEVELS))?;
        at_most("heads", self.heads as u64, MAX_HEADS)?;
        at_most("rows", self.rows as u64, MAX_EXTENT)?;
        at_most("columns", self.columns as u64, MAX_EXTENT)?;
        check_samples(self.samples)?;
        let extents = [self.samples.len(), self.heads, self.rows, width];
        let wanted = extents.iter().fold(1u128, |product, &extent| product.saturating_mul(extent as u128));
        if wanted == given as u128 { Ok(()) } else { Err(Error::Memory { given, wanted }) }
    }

    /// Call `fill(sample index, sample, head, row, places of the row)` for every row, on as many threads as `run` allows.
    fn for_each_row<T: Send>(
        &self,
        run: &Run<'_>,
        width: usize,
        out: &mut [T],
        fill: impl Fn(usize, u64, u32, u32, &mut [T]) + Sync,
    ) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let rows = (PIECE / self.columns).max(1);
        let pieces = out.len().div_ceil(rows * width);
        run.for_each(out.chunks_mut(rows * width).enumerate(), pieces, |(piece, places)| {
            let mut row = piece * rows % self.rows;
            let mut outer = piece * rows / self.rows;
            for place in places.chunks_exact_mut(width) {
                let (sample, head) = (outer / self.heads, outer % self.heads);
                fill(sample, self.samples[sample], head as u32, row as u32, place);
                row += 1;
                if row == self.rows {
                    (row, outer) = (0, outer + 1);
                }
            }
        })
    }
}

/// Every sample id fits the counter.
pub(crate) fn check_samples(samples: &[u64]) -> Result<()> {
    let worst = samples.iter().copied().max().unwrap_or(0);
    at_most("sample", worst, MAX_SAMPLE).map(|_| ())
}

/// One length a sample, none beyond the columns.
fn check_lengths(samples: usize, lengths: &[u32], columns: usize) -> Result<()> {
    if lengths.len() != samples {
        return Err(Error::Lengths { lengths: lengths.len(), samples });
    }
    let worst = lengths.iter().copied().max().unwrap_or(0);
    at_most("length", u64::from(worst), (columns as u64).min(MAX_EXTENT)).map(|_| ())
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
    use crate::rng::stream::{Site, SiteKey};
    use crate::simd::{Engine, Level};

    fn runs() -> Vec<Run<'static>> {
        let engines = Level::ALL.into_iter().filter_map(|level| Engine::new(level).ok());
        engines.flat_map(|engine| [1, 3].map(|threads| Run { engine, threads, interrupted: &|| false })).collect()
    }

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
            for run in runs() {
                let flat = if line[0] == "element" { rows } else { 1 };
                let mut words = vec![0xABAB_ABAB; samples.len() * heads * flat * bits::words(columns)];
                match line[0].as_str() {
                    "element" => element(&run, key, shape, threshold, &mut words),
                    "column" => column(&run, key, shape, None, threshold, &mut words),
                    _ => {
                        let lengths: Vec<u32> = list(11).into_iter().map(|l| l as u32).collect();
                        span(&run, key, shape, &lengths, threshold, &mut words)
                    }
                }
                .unwrap();
                let hex: String = words.iter().map(|w| format!("{w:08x}")).collect();
                assert_eq!(&hex, line.last().unwrap(), "{line:?} {:?}", run.engine);
            }
            seen += 1;
        }
        assert!(seen >= 50, "the vector file is empty");
    }

    /// A mask of several pieces: threads and engines share it out differently and agree.
    #[test]
    fn pieces_and_engines_agree() {
        let key = SiteKey([11, 12]);
        let shape = Shape { samples: &[5, 1 << 39, 6], heads: 3, rows: 401, columns: 517 };
        let mut all: Vec<(Vec<u32>, Vec<u8>)> = vec![];
        for run in runs() {
            let mut words = vec![0; 9 * 401 * 17];
            let mut bytes = vec![0; 9 * 401 * 517];
            element(&run, key, shape, 30_000, &mut words).unwrap();
            element_bytes(&run, key, shape, 30_000, &mut bytes).unwrap();
            let mut unpacked = vec![0; bytes.len()];
            bits::unpack(&run, &words, 517, &mut unpacked).unwrap();
            assert!(unpacked == bytes);
            all.push((words, bytes));
        }
        assert!(all.iter().all(|other| *other == all[0]));
    }

    #[test]
    fn limits_are_errors_and_empty_masks_are_not() {
        let key = SiteKey([1, 2]);
        let run = Run::new().unwrap();
        let shape = Shape { samples: &[1], heads: 1, rows: 1, columns: 1 };
        let draw =
            |shape: Shape<'_>, threshold, places: usize| element(&run, key, shape, threshold, &mut vec![0; places]);
        assert!(matches!(
            draw(Shape { columns: (1 << 20) + 1, ..shape }, 1, 1),
            Err(Error::Range { name: "columns", .. })
        ));
        assert!(matches!(draw(Shape { rows: (1 << 20) + 1, ..shape }, 1, 1), Err(Error::Range { name: "rows", .. })));
        assert!(matches!(draw(Shape { heads: (1 << 10) + 1, ..shape }, 1, 1), Err(Error::Range { name: "heads", .. })));
        assert!(matches!(draw(Shape { samples: &[1 << 40], ..shape }, 1, 1), Err(Error::Range { name: "sample", .. })));
        assert!(matches!(draw(shape, 65537, 1), Err(Error::Range { name: "threshold", .. })));
        assert_eq!(draw(shape, 1, 2), Err(Error::Memory { given: 2, wanted: 1 }));
        let huge = Shape { heads: 1 << 10, rows: 1 << 20, columns: 1 << 20, samples: &[0; 1 << 12] };
        assert!(matches!(draw(huge, 1, 1), Err(Error::Memory { .. })));
        for empty in [
            Shape { samples: &[], ..shape },
            Shape { heads: 0, ..shape },
            Shape { rows: 0, ..shape },
            Shape { columns: 0, ..shape },
        ] {
            assert_eq!(draw(empty, 1, 0), Ok(()));
        }
    }
}
