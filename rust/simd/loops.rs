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

/// Eight bits to eight bytes: a copy of the byte at every place, its own bit singled out, made 0 or 1.
#[inline(always)]
pub fn spread(byte: u8) -> u64 {
    let picked = (u64::from(byte) * 0x0101_0101_0101_0101) & 0x8040_2010_0804_0201;
    ((picked + 0x7F7F_7F7F_7F7F_7F7F) >> 7) & 0x0101_0101_0101_0101
}

#[inline(always)]
pub fn unpack(words: &[u32], out: &mut [u8]) {
    for (bytes, &word) in out.chunks_mut(32).zip(words) {
        for (eight, byte) in bytes.chunks_mut(8).zip(word.to_le_bytes()) {
            eight.copy_from_slice(&spread(byte).to_le_bytes()[..eight.len()]);
        }
    }
}
