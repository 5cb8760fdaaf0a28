//! Plain Rust, written so that the compiler vectorises it for the target's baseline (NEON, ...). On x86-64 the inner loop is
//! that of `sse2`, which is the baseline there.

use super::{Store, loops};
use crate::rng::philox::{LANES, M0, M1, ROUNDS, Row, mul, round};

pub use loops::{count, unpack, widen_ids};

pub fn apply_f32(x: &[f32], words: &[u32], scale: f32, out: &mut [f32], _: Store) {
    loops::apply(x, words, scale, out);
}

pub fn apply_bf16(x: &[u16], words: &[u32], scale: f32, out: &mut [u16], _: Store) {
    loops::apply(x, words, scale, out);
}

#[cfg(not(target_arch = "x86_64"))]
pub use plain_fill as fill;

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
pub fn fill(row: &Row, tile: u32, threshold: u16, out: &mut [u32]) {
    // SAFETY: every x86-64 processor has SSE2.
    unsafe { super::sse2::fill(row, tile, threshold, out) }
}

#[cfg_attr(target_arch = "x86_64", allow(dead_code))] // tests run it everywhere
pub fn plain_fill(row: &Row, tile: u32, threshold: u16, out: &mut [u32]) {
    for (index, words) in out.chunks_mut(4).enumerate() {
        let outputs = draw(row, LANES as u32 * (tile + index as u32));
        for (word, lanes) in words.iter_mut().zip(&outputs) {
            *word = pack(lanes, threshold);
        }
    }
}

/// The outputs for c1 = start..start + 16, word by word: `result[w][b]` is word w of counter start + b.
///
/// For SSE2 the compiler judges 32-bit products dear and multiplies one at a time; groups of 4, 8, 32 or 64 counters,
/// 64-bit lanes and a loop over whole counters were all tried and are no faster.
#[allow(clippy::needless_range_loop)] // lanes are indexed across four arrays: the form that becomes vectors
#[inline(always)]
fn draw(row: &Row, start: u32) -> [[u32; LANES]; 4] {
    let mut x = [[0u32; LANES]; 4];
    for b in 0..LANES {
        let (h0, l0) = mul(M0, row.x0 ^ start.wrapping_add(b as u32));
        let (h1, l1) = mul(M1, h0 ^ row.y2);
        (x[0][b], x[1][b], x[2][b], x[3][b]) = (h1 ^ row.z0, l1, l0 ^ row.z2, row.z3);
    }
    for r in 3..ROUNDS {
        let key = row.round_key(r);
        for b in 0..LANES {
            (x[0][b], x[1][b], x[2][b], x[3][b]) = round([x[0][b], x[1][b], x[2][b], x[3][b]], key).into();
        }
    }
    x
}

/// One output word of 16 consecutive counters to 32 mask bits: bit 2 b + h = half h of counter b reaches `threshold`.
#[inline(always)]
fn pack(lanes: &[u32; LANES], threshold: u16) -> u32 {
    // half >= t  <=>  half + (65536 - t) carries into bit 16: no comparison, so it is the same everywhere.
    let carry = (1 << 16) - u32::from(threshold);
    let pairs = lanes.map(|x| ((x & 0xFFFF) + carry) >> 16 | (((x >> 16) + carry) >> 15 & 2));
    // The upper half of the lanes moves behind the lower one, four times over: every shift is the same for all lanes.
    let eight: [u32; 8] = std::array::from_fn(|b| pairs[b] | pairs[b + 8] << 16);
    let four: [u32; 4] = std::array::from_fn(|b| eight[b] | eight[b + 4] << 8);
    let two: [u32; 2] = std::array::from_fn(|b| four[b] | four[b + 2] << 4);
    two[0] | two[1] << 2
}
