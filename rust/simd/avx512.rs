//! AVX-512: eight counters a register, words in the low halves of 64-bit lanes with anything above them.
//!
//! That is what `vpmuludq` reads and leaves: the low half of a product needs no instruction, the high half one shift, and
//! a round six instructions for eight counters. One 16-bit compare then makes 32 mask bits.

use super::{Store, fetch_ahead, loops};
use crate::rng::philox::{M0, M1, ROUNDS, Row};
use std::arch::x86_64::*;

/// Eight counters' words, one register each.
type Words = [__m512i; 4];

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn wide(x: u32) -> __m512i {
    _mm512_set1_epi32(x as i32)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn xor3(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32::<0x96>(a, b, c)
}

/// The high half of every 64-bit lane, with itself above it: port 5 does it where a shift needs port 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn high(x: __m512i) -> __m512i {
    _mm512_castps_si512(_mm512_movehdup_ps(_mm512_castsi512_ps(x)))
}

/// All rounds but the last, for `N` registers of counters in step: one alone would wait for its own multiplications.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn rounds<const N: usize>(row: &Row, c1: [__m512i; N]) -> [Words; N] {
    let (m0, m1) = (wide(M0), wide(M1));
    let mut x = c1.map(|c1| {
        let p0 = _mm512_mul_epu32(_mm512_xor_si512(c1, wide(row.x0)), m0);
        let p1 = _mm512_mul_epu32(_mm512_xor_si512(_mm512_srli_epi64::<32>(p0), wide(row.y2)), m1);
        [
            _mm512_xor_si512(_mm512_srli_epi64::<32>(p1), wide(row.z0)),
            p1,
            _mm512_xor_si512(p0, wide(row.z2)),
            wide(row.z3),
        ]
    });
    for r in 3..ROUNDS - 1 {
        let [k0, k1] = row.round_key(r).map(|k| wide(k));
        for x in &mut x {
            let (p0, p1) = (_mm512_mul_epu32(x[0], m0), _mm512_mul_epu32(x[2], m1));
            *x = [
                xor3(if r % 2 == 0 { high(p1) } else { _mm512_srli_epi64::<32>(p1) }, x[1], k0),
                p1,
                xor3(_mm512_srli_epi64::<32>(p0), x[3], k1),
                p0,
            ];
        }
    }
    x
}

/// Low or high halves of the 64-bit lanes of `a` and `b`, per 128 bits: two of `a`, then two of `b`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn halves<const PICK: i32>(a: __m512i, b: __m512i) -> __m512i {
    _mm512_castps_si512(_mm512_shuffle_ps::<PICK>(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)))
}

const LOW: i32 = 0x88;
const HIGH: i32 = 0xDD;

/// The last round of sixteen counters; its words leave as whole 32-bit lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn last(row: &Row, a: Words, b: Words) -> Words {
    let [k0, k1] = row.round_key(ROUNDS - 1);
    let (m0, m1) = (wide(M0), wide(M1));
    let (a0, b0) = (_mm512_mul_epu32(a[0], m0), _mm512_mul_epu32(b[0], m0));
    let (a1, b1) = (_mm512_mul_epu32(a[2], m1), _mm512_mul_epu32(b[2], m1));
    [
        xor3(halves::<HIGH>(a1, b1), halves::<LOW>(a[1], b[1]), wide(k0)),
        halves::<LOW>(a1, b1),
        xor3(halves::<HIGH>(a0, b0), halves::<LOW>(a[3], b[3]), wide(k1)),
        halves::<LOW>(a0, b0),
    ]
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
pub fn fill(row: &Row, tile: u32, threshold: u16, out: &mut [u32]) {
    // vshufps works within 128 bits: counters are dealt so that its result comes out in order.
    let even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
    let odd = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
    let t = _mm512_set1_epi16(threshold as i16);
    let draw = |index: u32, out: &mut [u32; 8]| {
        let (first, second) = (wide(16 * index), wide(16 * (index + 1)));
        let [a, b, c, d] = rounds(
            row,
            [
                _mm512_add_epi32(first, even),
                _mm512_add_epi32(first, odd),
                _mm512_add_epi32(second, even),
                _mm512_add_epi32(second, odd),
            ],
        );
        let bits = |word| _mm512_cmpge_epu16_mask(word, t);
        let ([a, b, c, d], [e, f, g, h]) = (last(row, a, b), last(row, c, d));
        *out = [bits(a), bits(b), bits(c), bits(d), bits(e), bits(f), bits(g), bits(h)];
    };
    // One call, for whole chunks and the last: a second one would keep the compiler from inlining it. The words go
    // straight to their places: stored apart and loaded together they would wait for the stores.
    let mut spare = [0; 8];
    for (index, words) in out.chunks_mut(8).enumerate() {
        let count = words.len();
        let whole = count == 8;
        let place = words.first_chunk_mut().unwrap_or(&mut spare);
        draw(tile + 2 * index as u32, place);
        if !whole {
            words.copy_from_slice(&spare[..count]);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn unpack(words: &[u32], out: &mut [u8]) {
    let one = _mm512_set1_epi8(1);
    let (whole, rest) = out.as_chunks_mut::<64>();
    let count = 2 * whole.len();
    for (bytes, pair) in whole.iter_mut().zip(words.as_chunks::<2>().0) {
        let bits = u64::from(pair[0]) | u64::from(pair[1]) << 32;
        // SAFETY: `bytes` is 64 bytes long; the store needs no alignment.
        unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), _mm512_maskz_mov_epi8(bits, one)) };
    }
    loops::unpack(&words[count..], rest);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
pub fn count(words: &[u32]) -> u32 {
    loops::count(words)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn widen_ids(x: &[i32], last: i32, out: &mut [i64]) -> bool {
    loops::widen_ids(x, last, out)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn apply_f32(x: &[f32], words: &[u32], scale: f32, out: &mut [f32], store: Store) {
    if store == Store::Around && out.as_ptr().addr().is_multiple_of(64) {
        scale_f32::<true>(x, words, scale, out);
    } else {
        scale_f32::<false>(x, words, scale, out);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn scale_f32<const AROUND: bool>(x: &[f32], words: &[u32], scale: f32, out: &mut [f32]) {
    let factor = _mm512_set1_ps(scale);
    let (inputs, last) = x.as_chunks::<32>();
    let (whole, rest) = out.as_chunks_mut::<32>();
    for ((y, x), &word) in whole.iter_mut().zip(inputs).zip(words) {
        if AROUND {
            fetch_ahead(x);
        }
        for half in 0..2 {
            let keep = (word >> (16 * half)) as u16;
            // SAFETY: both halves of `x` and `y` are 16 numbers long; AROUND promises that `out` begins at a multiple of
            // 64 bytes, and every half lies as many further; nothing else needs alignment.
            unsafe {
                let value = _mm512_maskz_mul_ps(keep, _mm512_loadu_ps(x.as_ptr().add(16 * half)), factor);
                let place = y.as_mut_ptr().add(16 * half);
                if AROUND { _mm512_stream_ps(place, value) } else { _mm512_storeu_ps(place, value) }
            }
        }
    }
    loops::apply(last, &words[inputs.len()..], scale, rest);
}

/// Numbers times `factor`, rounded to bfloat16 in the upper halves; the lower halves hold anything. NaN becomes anything.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn scaled(value: __m512i, factor: __m512) -> __m512i {
    let product = _mm512_mul_ps(_mm512_castsi512_ps(value), factor);
    let bits = _mm512_castps_si512(product);
    // Half a unit, less one where the last bit is even: ties go to even.
    let below = _mm512_add_epi32(bits, wide(0x7FFF));
    _mm512_mask_add_epi32(below, _mm512_test_epi32_mask(bits, wide(1 << 16)), below, wide(1))
}

/// 32 bfloat16 numbers times `factor`, rounded to nearest even; every NaN becomes the one that torch writes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn scaled_exactly(both: __m512i, factor: __m512) -> __m512i {
    const ODD: u32 = 0xAAAA_AAAA;
    let even = scaled(_mm512_slli_epi32::<16>(both), factor);
    let odd = scaled(_mm512_and_si512(both, wide(0xFFFF_0000)), factor);
    let merged = _mm512_mask_mov_epi16(_mm512_srli_epi32::<16>(even), ODD, odd);
    // A product is NaN where the number is (a scale is neither 0 nor infinite): one question for all 32.
    let magnitude = _mm512_and_si512(both, _mm512_set1_epi16(0x7FFF));
    let unordered = _mm512_cmpgt_epu16_mask(magnitude, _mm512_set1_epi16(0x7F80));
    _mm512_mask_mov_epi16(merged, unordered, _mm512_set1_epi16(0x7FC0))
}

/// The same by the processor's own conversion, which flushes subnormal products to zero and keeps a NaN's payload: where
/// one of 32 is either, they are computed again.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn scaled_natively(both: __m512i, factor: __m512) -> __m512i {
    const QUIET_NAN_SUBNORMAL_SIGNALLING_NAN: i32 = 0x01 | 0x20 | 0x80;
    let half = |bits: __m256i| {
        let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits));
        _mm512_mul_ps(_mm512_castsi512_ps(wide), factor)
    };
    let (low, high) = (half(_mm512_castsi512_si256(both)), half(_mm512_extracti64x4_epi64::<1>(both)));
    let special = _mm512_fpclass_ps_mask::<QUIET_NAN_SUBNORMAL_SIGNALLING_NAN>(low)
        | _mm512_fpclass_ps_mask::<QUIET_NAN_SUBNORMAL_SIGNALLING_NAN>(high);
    if special != 0 {
        return scaled_exactly(both, factor);
    }
    // SAFETY: both types are 512 bits without a meaning of their own.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn apply_bf16(x: &[u16], words: &[u32], scale: f32, out: &mut [u16], store: Store) {
    let around = store == Store::Around && out.as_ptr().addr().is_multiple_of(64);
    if !is_x86_feature_detected!("avx512bf16") {
        return if around { exact::<true>(x, words, scale, out) } else { exact::<false>(x, words, scale, out) };
    }
    // SAFETY: the feature was detected just above.
    unsafe { if around { native::<true>(x, words, scale, out) } else { native::<false>(x, words, scale, out) } }
}

/// The loop over 32 numbers at a time. A macro, because a function with fewer features than its argument is not inlined.
macro_rules! apply_bf16 {
    ($name:ident, $features:literal, $scaled:ident) => {
        #[target_feature(enable = $features)]
        fn $name<const AROUND: bool>(x: &[u16], words: &[u32], scale: f32, out: &mut [u16]) {
            let factor = _mm512_set1_ps(scale);
            let (inputs, last) = x.as_chunks::<32>();
            let (whole, rest) = out.as_chunks_mut::<32>();
            for ((y, x), &word) in whole.iter_mut().zip(inputs).zip(words) {
                if AROUND {
                    fetch_ahead(x);
                }
                // SAFETY: `x` and `y` are 32 numbers long; AROUND promises that `out` begins at a multiple of 64 bytes, and
                // every `y` lies as many further; nothing else needs alignment.
                unsafe {
                    let scaled = $scaled(_mm512_loadu_si512(x.as_ptr().cast()), factor);
                    let (place, value) = (y.as_mut_ptr().cast(), _mm512_maskz_mov_epi16(word, scaled));
                    if AROUND { _mm512_stream_si512(place, value) } else { _mm512_storeu_si512(place.cast(), value) }
                }
            }
            loops::apply(last, &words[inputs.len()..], scale, rest);
        }
    };
}

apply_bf16!(exact, "avx512f,avx512bw,avx512dq,avx512vl", scaled_exactly);
apply_bf16!(native, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16", scaled_natively);
