//! Inverted dropout of every feature on its own.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Rows, check_scale, width};
use crate::error::{Result, at_most};
use crate::mask::element::for_each_block;
use crate::mask::threshold::LEVELS;
use crate::rng::stream::{MAX_EXTENT, Pattern, SiteKey};
use crate::simd::{Float, Store};
use crate::threads::{PIECE, Run};

/// `out = keep ? x * scale : 0` for `x` of (rows, features), the keep mask's row being (sample, position).
///
/// Returns how many places were kept, those of padding not counted.
pub fn element<F: Float>(
    run: &Run<'_>,
    key: SiteKey,
    rows: Rows<'_>,
    threshold: u32,
    scale: f32,
    x: &[F],
    out: &mut [F],
) -> Result<u64> {
    at_most("threshold", u64::from(threshold), u64::from(LEVELS))?;
    check_scale(scale)?;
    let features = width(rows.check()?, x.len(), out.len())?;
    at_most("features", features as u64, MAX_EXTENT)?;
    if out.is_empty() {
        return Ok(0);
    }
    let (engine, store) = (run.engine, Store::of(size_of_val(out)));
    let kept = AtomicU64::new(0);
    let many = (PIECE / features).max(1);
    let pieces = rows.samples.len().div_ceil(many);
    let tasks = x.chunks(many * features).zip(out.chunks_mut(many * features)).enumerate();
    run.for_each(tasks, pieces, |(piece, (x, out))| {
        let mut count = 0;
        let places = rows.samples[piece * many..].iter().zip(&rows.positions[piece * many..]);
        for ((&sample, &position), (x, out)) in places.zip(x.chunks_exact(features).zip(out.chunks_exact_mut(features)))
        {
            if sample < 0 {
                out.fill(F::ZERO);
                continue;
            }
            let counters = key.row(Pattern::Element, sample as u64, 0, position as u32);
            let mut done = 0;
            for_each_block(engine, &counters, threshold, out, |words, out| {
                count += u64::from(engine.count(words));
                engine.apply(&x[done..done + out.len()], words, scale, out, store);
                done += out.len();
            });
        }
        store.arrive();
        kept.fetch_add(count, Ordering::Relaxed);
    })?;
    Ok(kept.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::{self, Shape, bits};

    #[test]
    fn it_is_the_mask_applied() {
        let run = Run::new().unwrap();
        let key = SiteKey([8, 9]);
        for features in [1, 33, 2048, 2100, 5000] {
            let x: Vec<f32> = (0..3 * features).map(|i| i as f32 - 50.5).collect();
            let mut out = vec![9.0; x.len()];
            let rows = Rows { samples: &[70, -1, 3], positions: &[2, 0, 0] };
            let counted = element(&run, key, rows, 9000, 1.5, &x, &mut out).unwrap();
            let mut kept = 0;
            for (row, sample, position) in [(0, 70, 2), (2, 3, 0)] {
                let mut words = vec![0; (position + 1) * bits::words(features)];
                let shape = Shape { samples: &[sample], heads: 1, rows: position + 1, columns: features };
                mask::element(&run, key, shape, 9000, &mut words).unwrap();
                let words = &words[position * bits::words(features)..];
                for i in 0..features {
                    let keep = words[i / 32] >> (i % 32) & 1 == 1;
                    kept += u64::from(keep);
                    assert_eq!(out[row * features + i], if keep { x[row * features + i] * 1.5 } else { 0.0 });
                }
            }
            assert_eq!(counted, kept);
            assert!(out[features..2 * features].iter().all(|&v| v == 0.0));
        }
    }

    #[test]
    fn bad_input_is_refused() {
        let run = Run::new().unwrap();
        let attempt = |samples: &[i64], positions: &[i64], places: usize| {
            let (rows, mut out) = (Rows { samples, positions }, vec![0.0; places]);
            element(&run, SiteKey([0, 0]), rows, 5, 1.0, &[1.0f32; 4], &mut out).unwrap_err().to_string()
        };
        assert!(attempt(&[-2, 0], &[0, 0], 4).starts_with("sample must be at least 0 (got -2)"));
        assert!(attempt(&[1, 0], &[0, 1 << 20], 4).starts_with("position must lie in"));
        assert!(attempt(&[1, 0], &[0], 4).contains("got room for 1"));
        assert!(attempt(&[1, 0, 2], &[0, 0, 0], 4).contains("got room for 4"));
        assert!(attempt(&[1, 0], &[0, 0], 5).contains("got room for 5"));
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let rows = Rows { samples: &[], positions: &[] };
            let refused = element(&run, SiteKey([0, 0]), rows, 5, scale, &[] as &[f32], &mut []).unwrap_err();
            assert!(refused.to_string().starts_with("scale must be"));
        }
    }
}
