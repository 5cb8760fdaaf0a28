//! The portable level's inner loop where the baseline is x86-64: two counters a register.
//!
//! Every such processor has SSE2, so nothing is asked for at run time. The compiler would make the same of
//! the portable loop, but judges 32-bit products dear without SSE4.1 and multiplies one number at a time.

use crate::rng::philox::{M0, M1, ROUNDS, Row};
use std::arch::x86_64::*;

/// Two counters' words, one register each.
type Words = [__m128i; 4];

#[inline]
#[target_feature(enable = "sse2")]
fn wide(x: u32) -> __m128i {
    _mm_set1_epi32(x as i32)
}

#[inline]
#[target_feature(enable = "sse2")]
fn xor3(a: __m128i, b: __m128i, c: __m128i) -> __m128i {
    _mm_xor_si128(a, _mm_xor_si128(b, c))
}

/// Rounds that every counter runs in full, the last one apart.
const FULL: usize = ROUNDS as usize - 4;

/// A [`Row`] in memory that instructions read directly.
struct Wide {
    m: [__m128i; 2],
    x0: __m128i,
    y2: __m128i,
    z: [__m128i; 3],
    keys: [[__m128i; 2]; FULL],
    last: [__m128i; 2],
}

#[inline]
#[target_feature(enable = "sse2")]
fn widen(row: &Row) -> Wide {
    let key = |round| row.round_key(round).map(|k| wide(k));
    Wide {
        m: [wide(M0), wide(M1)],
        x0: wide(row.x0),
        y2: wide(row.y2),
        z: [wide(row.z0), wide(row.z2), wide(row.z3)],
        keys: [key(3), key(4), key(5), key(6), key(7), key(8)],
        last: key(9),
    }
}

/// All rounds but the last, for two registers of counters in step: one alone would wait for its own multiplications. A
/// macro, because the compiler would neither inline a function of this size nor unroll a loop of it.
macro_rules! rounds {
    ($row:expr, $c1:expr, $($key:expr),*) => {{
        let [m0, m1] = $row.m;
        let mut x: [Words; 2] = $c1.map(|c1| {
            let p0 = _mm_mul_epu32(_mm_xor_si128(c1, $row.x0), m0);
            let p1 = _mm_mul_epu32(_mm_xor_si128(_mm_srli_epi64::<32>(p0), $row.y2), m1);
            [_mm_xor_si128(_mm_srli_epi64::<32>(p1), $row.z[0]), p1, _mm_xor_si128(p0, $row.z[1]), $row.z[2]]
        });
        $(
            for x in &mut x {
                let [k0, k1] = $row.keys[$key];
                let (p0, p1) = (_mm_mul_epu32(x[0], m0), _mm_mul_epu32(x[2], m1));
                let (h0, h1) = (_mm_srli_epi64::<32>(p0), _mm_srli_epi64::<32>(p1));
                *x = [xor3(h1, x[1], k0), p1, xor3(h0, x[3], k1), p0];
            }
        )*
        x
    }};
}

/// Low or high halves of the 64-bit lanes of `a`, then of `b`.
#[inline]
#[target_feature(enable = "sse2")]
fn halves<const PICK: i32>(a: __m128i, b: __m128i) -> __m128i {
    _mm_castps_si128(_mm_shuffle_ps::<PICK>(_mm_castsi128_ps(a), _mm_castsi128_ps(b)))
}

const LOW: i32 = 0x88;
const HIGH: i32 = 0xDD;

/// The last round of four counters; its words leave as whole 32-bit lanes.
#[inline]
#[target_feature(enable = "sse2")]
fn last(row: &Wide, [a, b]: [Words; 2]) -> Words {
    let ([m0, m1], [k0, k1]) = (row.m, row.last);
    let (a0, b0) = (_mm_mul_epu32(a[0], m0), _mm_mul_epu32(b[0], m0));
    let (a1, b1) = (_mm_mul_epu32(a[2], m1), _mm_mul_epu32(b[2], m1));
    [
        xor3(halves::<HIGH>(a1, b1), halves::<LOW>(a[1], b[1]), k0),
        halves::<LOW>(a1, b1),
        xor3(halves::<HIGH>(a0, b0), halves::<LOW>(a[3], b[3]), k1),
        halves::<LOW>(a0, b0),
    ]
}

#[target_feature(enable = "sse2")]
pub fn fill(row: &Row, tile: u32, threshold: u16, out: &mut [u32]) {
    let row = &widen(row);
    let t = _mm_set1_epi16(threshold as i16);
    // There is no unsigned compare of 16 bits: x >= t  <=>  t - x, cut off at 0, is 0.
    let reaches = |x: __m128i| _mm_cmpeq_epi16(_mm_subs_epu16(t, x), _mm_setzero_si128());
    let four = |start: u32| {
        let at = |counter: u32| _mm_set_epi64x(i64::from(counter + 1), i64::from(counter));
        last(row, rounds!(row, [at(start), at(start + 2)], 0, 1, 2, 3, 4, 5)).map(reaches)
    };
    for (index, words) in out.chunks_mut(4).enumerate() {
        let start = 16 * (tile + index as u32);
        let parts = [four(start), four(start + 4), four(start + 8), four(start + 12)];
        let bits = |a: usize, w: usize| _mm_movemask_epi8(_mm_packs_epi16(parts[a][w], parts[a + 1][w])) as u32;
        let drawn: [u32; 4] = std::array::from_fn(|w| bits(0, w) | bits(2, w) << 16);
        words.copy_from_slice(&drawn[..words.len()]);
    }
}
