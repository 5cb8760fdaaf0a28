//! Loops in plain Rust: all of the portable level, and the ends of rows of the others.

use super::Float;

#[inline(always)]
pub fn apply<F: Float>(x: &[F], words: &[u32], scale: f32, out: &mut [F]) {
    let (whole, rest) = out.as_chunks_mut::<32>();
    let (inputs, last) = x.as_chunks::<32>();
    for ((y, x), &word) in whole.iter_mut().zip(inputs).zip(words) {
        for i in 0..32 {
            let scaled = F::round(x[i].widen() * scale);
            y[i] = if word >> i & 1 == 1 { scaled } else { F::ZERO };
        }
    }
    if let Some(&word) = words.get(inputs.len()) {
        for (i, (y, x)) in rest.iter_mut().zip(last).enumerate() {
            let scaled = F::round(x.widen() * scale);
            *y = if word >> i & 1 == 1 { scaled } else { F::ZERO };
        }
    }
}

#[inline(always)]
pub fn count(words: &[u32]) -> u32 {
    let (pairs, last) = words.as_chunks::<2>();
    let both = |pair: &[u32; 2]| (u64::from(pair[0]) | u64::from(pair[1]) << 32).count_ones();
    pairs.iter().map(both).sum::<u32>() + last.iter().map(|word| word.count_ones()).sum::<u32>()
}

/// A word's bits, one byte each: a copy of their byte at every place, the own bit singled out. Vectors all the way.
#[inline(always)]
fn spread(word: u32) -> [u8; 32] {
    let bytes = word.to_le_bytes();
    std::array::from_fn(|i| u8::from(bytes[i / 8] & (1 << (i % 8)) != 0))
}

#[inline(always)]
pub fn unpack(words: &[u32], out: &mut [u8]) {
    let (whole, rest) = out.as_chunks_mut::<32>();
    whole.iter_mut().zip(words).for_each(|(bytes, &word)| *bytes = spread(word));
    if let Some(&word) = words.get(whole.len()) {
        rest.copy_from_slice(&spread(word)[..rest.len()]);
    }
}

/// Widen, and look whether all lie in `0..=last`: the sign of `x | last - x` is set exactly where one does not, which needs
/// no branch.
#[inline(always)]
pub fn widen_ids(x: &[i32], last: i32, out: &mut [i64]) -> bool {
    let mut seen = 0;
    for (y, &x) in out.iter_mut().zip(x) {
        seen |= x | last.wrapping_sub(x);
        *y = i64::from(x);
    }
    seen >= 0
}
