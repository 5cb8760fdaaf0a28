//! AVX2: four counters a register, words in the low halves of 64-bit lanes with anything above them.
//!
//! That is what `vpmuludq` reads and leaves: the low half of a product needs no instruction, the high half one shift.

use super::{Store, fetch_ahead, loops};
use crate::rng::philox::{M0, M1, ROUNDS, Row};
use std::arch::x86_64::*;

/// Four counters' words, one register each.
type Words = [__m256i; 4];

#[inline]
#[target_feature(enable = "avx2")]
fn wide(x: u32) -> __m256i {
    _mm256_set1_epi32(x as i32)
}

#[inline]
#[target_feature(enable = "avx2")]
fn xor3(a: __m256i, b: __m256i, c: __m256i) -> __m256i {
    _mm256_xor_si256(a, _mm256_xor_si256(b, c))
}

/// A [`Row`] in registers, or in memory that instructions read directly.
struct Wide {
    m: [__m256i; 2],
    x0: __m256i,
    y2: __m256i,
    z: [__m256i; 3],
    keys: [[__m256i; 2]; FULL],
    last: [__m256i; 2],
}

/// Rounds that every counter runs in full, the last one apart.
const FULL: usize = ROUNDS as usize - 4;

#[inline]
#[target_feature(enable = "avx2")]
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

/// All rounds but the last, for the registers of counters in `$c1`, in step: one alone would wait for its own
/// multiplications. A macro, because the compiler would neither inline a function of this size nor unroll a loop of it.
macro_rules! rounds {
    ($row:expr, $c1:expr, $($key:expr),*) => {{
        let [m0, m1] = $row.m;
        let mut x: [Words; _] = $c1.map(|c1| {
            let p0 = _mm256_mul_epu32(_mm256_xor_si256(c1, $row.x0), m0);
            let p1 = _mm256_mul_epu32(_mm256_xor_si256(_mm256_srli_epi64::<32>(p0), $row.y2), m1);
            let x0 = _mm256_xor_si256(_mm256_srli_epi64::<32>(p1), $row.z[0]);
            [x0, p1, _mm256_xor_si256(p0, $row.z[1]), $row.z[2]]
        });
        $(
            for x in &mut x {
                let [k0, k1] = $row.keys[$key];
                let (p0, p1) = (_mm256_mul_epu32(x[0], m0), _mm256_mul_epu32(x[2], m1));
                let (h0, h1) = (_mm256_srli_epi64::<32>(p0), _mm256_srli_epi64::<32>(p1));
                *x = [xor3(h1, x[1], k0), p1, xor3(h0, x[3], k1), p0];
            }
        )*
        x
    }};
}

/// Low or high halves of the 64-bit lanes of `a` and `b`, per 128 bits: two of `a`, then two of `b`.
#[inline]
#[target_feature(enable = "avx2")]
fn halves<const PICK: i32>(a: __m256i, b: __m256i) -> __m256i {
    _mm256_castps_si256(_mm256_shuffle_ps::<PICK>(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)))
}

const LOW: i32 = 0x88;
const HIGH: i32 = 0xDD;

/// The last round of eight counters; its words leave as whole 32-bit lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn last(row: &Wide, a: Words, b: Words) -> Words {
    let ([m0, m1], [k0, k1]) = (row.m, row.last);
    let (a0, b0) = (_mm256_mul_epu32(a[0], m0), _mm256_mul_epu32(b[0], m0));
    let (a1, b1) = (_mm256_mul_epu32(a[2], m1), _mm256_mul_epu32(b[2], m1));
    [
        xor3(halves::<HIGH>(a1, b1), halves::<LOW>(a[1], b[1]), k0),
        halves::<LOW>(a1, b1),
        xor3(halves::<HIGH>(a0, b0), halves::<LOW>(a[3], b[3]), k1),
        halves::<LOW>(a0, b0),
    ]
}

#[target_feature(enable = "avx2,popcnt")]
pub fn fill(row: &Row, tile: u32, threshold: u16, out: &mut [u32]) {
    // vpackssdw works within 128 bits: counters are dealt so that its result comes out in order.
    let lanes = [
        _mm256_setr_epi64x(0, 1, 8, 9),
        _mm256_setr_epi64x(2, 3, 10, 11),
        _mm256_setr_epi64x(4, 5, 12, 13),
        _mm256_setr_epi64x(6, 7, 14, 15),
    ];
    let row = &widen(row);
    // There is no unsigned compare of 16 bits: x >= t  <=>  max(x, t) = x.
    let t = _mm256_set1_epi16(threshold as i16);
    let reaches = |x: __m256i| _mm256_cmpeq_epi16(_mm256_max_epu16(x, t), x);
    let draw = |index: u32, out: &mut [u32; 4]| {
        let start = wide(16 * index);
        let at = |lane: usize| _mm256_add_epi32(start, lanes[lane]);
        let [a, b] = rounds!(row, [at(0), at(1)], 0, 1, 2, 3, 4, 5);
        let low = last(row, a, b);
        let [a, b] = rounds!(row, [at(2), at(3)], 0, 1, 2, 3, 4, 5);
        let high = last(row, a, b);
        let bits = |w: usize| _mm256_movemask_epi8(_mm256_packs_epi16(reaches(low[w]), reaches(high[w]))) as u32;
        *out = [bits(0), bits(1), bits(2), bits(3)];
    };
    // One call, for whole chunks and the last: a second one would keep the compiler from inlining it. The words go
    // straight to their places: stored apart and loaded together they would wait for the stores.
    let mut spare = [0; 4];
    for (index, words) in out.chunks_mut(4).enumerate() {
        let count = words.len();
        let whole = count == 4;
        let place = words.first_chunk_mut().unwrap_or(&mut spare);
        draw(tile + index as u32, place);
        if !whole {
            words.copy_from_slice(&spare[..count]);
        }
    }
}

#[target_feature(enable = "avx2")]
pub fn unpack(words: &[u32], out: &mut [u8]) {
    let spread = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let one = _mm256_set1_epi8(1);
    let (whole, rest) = out.as_chunks_mut::<32>();
    let count = whole.len();
    for (bytes, &word) in whole.iter_mut().zip(words) {
        let copies = _mm256_shuffle_epi8(wide(word), spread);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(copies, bit), bit);
        // SAFETY: `bytes` is 32 bytes long; the store needs no alignment.
        unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), _mm256_and_si256(set, one)) };
    }
    loops::unpack(&words[count..], rest);
}

#[target_feature(enable = "avx2,popcnt")]
pub fn count(words: &[u32]) -> u32 {
    loops::count(words)
}

#[target_feature(enable = "avx2")]
pub fn widen_ids(x: &[i32], last: i32, out: &mut [i64]) -> bool {
    loops::widen_ids(x, last, out)
}

/// Eight bits to eight lanes of all ones or zero.
#[inline]
#[target_feature(enable = "avx2")]
fn lanes(byte: u32) -> __m256i {
    let bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    _mm256_cmpeq_epi32(_mm256_and_si256(wide(byte), bit), bit)
}

#[target_feature(enable = "avx2")]
pub fn apply_f32(x: &[f32], words: &[u32], scale: f32, out: &mut [f32], store: Store) {
    if store == Store::Around && out.as_ptr().addr().is_multiple_of(32) {
        scale_f32::<true>(x, words, scale, out);
    } else {
        scale_f32::<false>(x, words, scale, out);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn scale_f32<const AROUND: bool>(x: &[f32], words: &[u32], scale: f32, out: &mut [f32]) {
    let factor = _mm256_set1_ps(scale);
    let (inputs, last) = x.as_chunks::<32>();
    let (whole, rest) = out.as_chunks_mut::<32>();
    for ((y, x), &word) in whole.iter_mut().zip(inputs).zip(words) {
        if AROUND {
            fetch_ahead(x);
        }
        for part in 0..4 {
            let keep = _mm256_castsi256_ps(lanes(word >> (8 * part)));
            // SAFETY: every quarter of `x` and `y` is 8 numbers long; AROUND promises that `out` begins at a multiple of 32
            // bytes, and every quarter lies as many further; nothing else needs alignment.
            unsafe {
                let value = _mm256_and_ps(_mm256_mul_ps(_mm256_loadu_ps(x.as_ptr().add(8 * part)), factor), keep);
                let place = y.as_mut_ptr().add(8 * part);
                if AROUND { _mm256_stream_ps(place, value) } else { _mm256_storeu_ps(place, value) }
            }
        }
    }
    loops::apply(last, &words[inputs.len()..], scale, rest);
}

#[target_feature(enable = "avx2")]
pub fn apply_bf16(x: &[u16], words: &[u32], scale: f32, out: &mut [u16], store: Store) {
    if store == Store::Around && out.as_ptr().addr().is_multiple_of(32) {
        scale_bf16::<true>(x, words, scale, out);
    } else {
        scale_bf16::<false>(x, words, scale, out);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn scale_bf16<const AROUND: bool>(x: &[u16], words: &[u32], scale: f32, out: &mut [u16]) {
    let factor = _mm256_set1_ps(scale);
    let (half, one, nan) = (wide(0x7FFF), wide(1), wide(0x7FC0));
    let (inputs, last) = x.as_chunks::<32>();
    let (whole, rest) = out.as_chunks_mut::<32>();
    for ((y, x), &word) in whole.iter_mut().zip(inputs).zip(words) {
        if AROUND {
            fetch_ahead(x);
        }
        let eight = |part: usize| {
            // SAFETY: every quarter of `x` is 8 numbers long; the load needs no alignment.
            let bits = unsafe { _mm_loadu_si128(x.as_ptr().add(8 * part).cast()) };
            let value = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)));
            let product = _mm256_mul_ps(value, factor);
            let wide = _mm256_castps_si256(product);
            // Half a unit, and one less where the last bit is even: ties go to even.
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(wide), one);
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(wide, _mm256_add_epi32(half, odd)));
            let unordered = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(product, product));
            _mm256_and_si256(_mm256_blendv_epi8(rounded, nan, unordered), lanes(word >> (8 * part)))
        };
        for pair in 0..2 {
            let packed = _mm256_packus_epi32(eight(2 * pair), eight(2 * pair + 1));
            let ordered = _mm256_permute4x64_epi64::<0xD8>(packed);
            // SAFETY: either half of `y` is 16 numbers long; AROUND promises that `out` begins at a multiple of 32 bytes, and
            // every half lies as many further; the other store needs no alignment.
            unsafe {
                let place = y.as_mut_ptr().add(16 * pair).cast();
                if AROUND { _mm256_stream_si256(place, ordered) } else { _mm256_storeu_si256(place, ordered) }
            }
        }
    }
    loops::apply(last, &words[inputs.len()..], scale, rest);
}
