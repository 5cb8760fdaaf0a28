//! Dropout of whole rows (tokens): column and span HiddenCut.

use super::{check_scale, width};
use crate::error::Result;
use crate::mask::bits;
use crate::simd::{Float, Store};
use crate::threads::{PIECE, Run};

/// `out = keep ? x * scale : 0` for `x` of (rows, features) and one byte `keep`, 0 or 1, a row.
pub fn rows<F: Float>(run: &Run<'_>, keep: &[u8], scale: f32, x: &[F], out: &mut [F]) -> Result<()> {
    check_scale(scale)?;
    let features = width(keep.len(), x.len(), out.len())?;
    if out.is_empty() {
        return Ok(());
    }
    let (engine, store) = (run.engine, Store::of(size_of_val(out)));
    let all = vec![u32::MAX; bits::words(features)];
    let rows = (PIECE / features).max(1);
    let tasks = keep.chunks(rows).zip(x.chunks(rows * features).zip(out.chunks_mut(rows * features)));
    run.for_each(tasks, keep.len().div_ceil(rows), |(keep, (x, out))| {
        for ((&keep, x), out) in keep.iter().zip(x.chunks_exact(features)).zip(out.chunks_exact_mut(features)) {
            if keep == 0 {
                out.fill(F::ZERO);
            } else if scale == 1.0 {
                out.copy_from_slice(x);
            } else {
                engine.apply(x, &all, scale, out, store);
            }
        }
        store.arrive();
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_or_stay() {
        let run = Run::new().unwrap();
        let x = [1.0f32, 2.0, 3.0, f32::NAN, 5.0, 6.0];
        let mut out = [9.0; 6];
        rows(&run, &[1, 0, 1], 2.0, &x, &mut out).unwrap();
        assert_eq!(out, [2.0, 4.0, 0.0, 0.0, 10.0, 12.0]);
        rows(&run, &[1, 0, 1], 1.0, &x, &mut out).unwrap();
        assert_eq!(out, [1.0, 2.0, 0.0, 0.0, 5.0, 6.0]);
        assert!(rows(&run, &[1, 0, 1, 1], 1.0, &x, &mut out).is_err());
        assert_eq!(rows(&run, &[], 1.0, &[] as &[f32], &mut []), Ok(()));
    }
}
