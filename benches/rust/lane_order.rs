//! The prototype behind the lane order of stream `hk1`: nanoseconds a decision of packed element bits, one thread.
//!
//! `cargo bench --bench lane_order`. All variants of the shipped order must agree with the library before any is timed.

use hiddenkey_rs::mask::{Shape, element};
#[cfg(target_arch = "x86_64")]
use hiddenkey_rs::rng::stream::Pattern;
use hiddenkey_rs::rng::stream::{Site, SiteKey};
use hiddenkey_rs::simd::{Engine, Level};
use hiddenkey_rs::threads::Run;
use std::hint::black_box;
use std::time::Instant;

const COLUMNS: usize = 1 << 12;
const ROWS: usize = 1 << 11;
const THRESHOLD: u32 = 6554;
const REPEATS: usize = 15;

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod simd {
    use hiddenkey_rs::rng::philox::Row;
    use std::arch::x86_64::*;

    const M0: u32 = 0xD251_1F53;
    const M1: u32 = 0xCD9E_8D57;
    const W0: u32 = 0x9E37_79B9;
    const W1: u32 = 0xBB67_AE85;

    /// High and low halves of 16 products with a constant.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn mul512(x: __m512i, m: __m512i) -> (__m512i, __m512i) {
        let even = _mm512_mul_epu32(x, m);
        let odd = _mm512_mul_epu32(_mm512_srli_epi64::<32>(x), m);
        let hi = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64::<32>(even), odd);
        let lo = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64::<32>(odd));
        (hi, lo)
    }

    const STEPS: [i32; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn rounds512(mut x: [__m512i; 4], key: [u32; 2], first: u32) -> [__m512i; 4] {
        let (m0, m1) = (_mm512_set1_epi32(M0 as i32), _mm512_set1_epi32(M1 as i32));
        for r in first..10 {
            let k0 = _mm512_set1_epi32(key[0].wrapping_add(W0.wrapping_mul(r)) as i32);
            let k1 = _mm512_set1_epi32(key[1].wrapping_add(W1.wrapping_mul(r)) as i32);
            let (h0, l0) = mul512(x[0], m0);
            let (h1, l1) = mul512(x[2], m1);
            // One three-way xor each.
            x = [
                _mm512_ternarylogic_epi32::<0x96>(h1, x[1], k0),
                l1,
                _mm512_ternarylogic_epi32::<0x96>(h0, x[3], k1),
                l0,
            ];
        }
        x
    }

    /// One tile of 16 counters, c1 varies: three rounds from the row's constants, seven in full.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn tile512(row: &Row, block: u32) -> [__m512i; 4] {
        let wide = |x: u32| _mm512_set1_epi32(x as i32);
        let lanes = _mm512_add_epi32(wide(block), steps512());
        let (h0, l0) = mul512(_mm512_xor_si512(lanes, wide(row.x0)), wide(M0));
        let (h1, l1) = mul512(_mm512_xor_si512(h0, wide(row.y2)), wide(M1));
        let x = [_mm512_xor_si512(h1, wide(row.z0)), l1, _mm512_xor_si512(l0, wide(row.z2)), wide(row.z3)];
        rounds512(x, row.key, 3)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn steps512() -> __m512i {
        let s = STEPS;
        _mm512_setr_epi32(
            s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15],
        )
    }

    /// The same with the varying word in c0: all ten rounds depend on it.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn c0_varies512(counter: [u32; 4], key: [u32; 2], threshold: u32, out: &mut [u32]) {
        let wide = |x: u32| _mm512_set1_epi32(x as i32);
        let t = _mm512_set1_epi16(threshold as i16);
        for (tile, words) in out.chunks_exact_mut(4).enumerate() {
            let lanes = _mm512_add_epi32(wide(16 * tile as u32), steps512());
            let x = rounds512([lanes, wide(counter[1]), wide(counter[2]), wide(counter[3])], key, 0);
            for (word, lanes) in words.iter_mut().zip(x) {
                *word = _mm512_cmpge_epu16_mask(lanes, t);
            }
        }
    }

    /// The shipped order: one compare a word gives 32 consecutive bits.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn row512(row: &Row, threshold: u32, out: &mut [u32]) {
        let t = _mm512_set1_epi16(threshold as i16);
        for (tile, words) in out.chunks_exact_mut(4).enumerate() {
            let x = tile512(row, 16 * tile as u32);
            for (word, lanes) in words.iter_mut().zip(x) {
                *word = _mm512_cmpge_epu16_mask(lanes, t);
            }
        }
    }

    /// The naive order, column = 8 block + lane: the four words must be transposed before the compare.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn naive512(row: &Row, threshold: u32, out: &mut [u32]) {
        let t = _mm512_set1_epi16(threshold as i16);
        for (tile, words) in out.chunks_exact_mut(4).enumerate() {
            let [x0, x1, x2, x3] = tile512(row, 16 * tile as u32);
            let (a, b) = (_mm512_unpacklo_epi32(x0, x1), _mm512_unpackhi_epi32(x0, x1));
            let (d, e) = (_mm512_unpacklo_epi32(x2, x3), _mm512_unpackhi_epi32(x2, x3));
            let (p, q) = (_mm512_unpacklo_epi64(a, d), _mm512_unpackhi_epi64(a, d));
            let (r, s) = (_mm512_unpacklo_epi64(b, e), _mm512_unpackhi_epi64(b, e));
            // Each of p..s holds four whole counters, 4 apart: gather them into order.
            let (pq0, pq1) = (_mm512_shuffle_i32x4::<0x44>(p, q), _mm512_shuffle_i32x4::<0xEE>(p, q));
            let (rs0, rs1) = (_mm512_shuffle_i32x4::<0x44>(r, s), _mm512_shuffle_i32x4::<0xEE>(r, s));
            let ordered = [
                _mm512_shuffle_i32x4::<0x88>(pq0, rs0),
                _mm512_shuffle_i32x4::<0xDD>(pq0, rs0),
                _mm512_shuffle_i32x4::<0x88>(pq1, rs1),
                _mm512_shuffle_i32x4::<0xDD>(pq1, rs1),
            ];
            for (word, lanes) in words.iter_mut().zip(ordered) {
                *word = _mm512_cmpge_epu16_mask(lanes, t);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn mul256(x: __m256i, m: __m256i) -> (__m256i, __m256i) {
        let even = _mm256_mul_epu32(x, m);
        let odd = _mm256_mul_epu32(_mm256_srli_epi64::<32>(x), m);
        let hi = _mm256_blend_epi32::<0xAA>(_mm256_srli_epi64::<32>(even), odd);
        let lo = _mm256_blend_epi32::<0xAA>(even, _mm256_slli_epi64::<32>(odd));
        (hi, lo)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn tile256(row: &Row, block: u32) -> [__m256i; 4] {
        let wide = |x: u32| _mm256_set1_epi32(x as i32);
        let lanes = _mm256_add_epi32(wide(block), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        let (m0, m1) = (wide(M0), wide(M1));
        let (h0, l0) = mul256(_mm256_xor_si256(lanes, wide(row.x0)), m0);
        let y2 = _mm256_xor_si256(h0, wide(row.y2));
        let (h1, l1) = mul256(y2, m1);
        let mut x0 = _mm256_xor_si256(h1, wide(row.z0));
        let mut x1 = l1;
        let mut x2 = _mm256_xor_si256(l0, wide(row.z2));
        let mut x3 = wide(row.z3);
        for r in 3..10u32 {
            let k0 = wide(row.key[0].wrapping_add(W0.wrapping_mul(r)));
            let k1 = wide(row.key[1].wrapping_add(W1.wrapping_mul(r)));
            let (h0, l0) = mul256(x0, m0);
            let (h1, l1) = mul256(x2, m1);
            x0 = _mm256_xor_si256(_mm256_xor_si256(h1, x1), k0);
            x2 = _mm256_xor_si256(_mm256_xor_si256(h0, x3), k1);
            x1 = l1;
            x3 = l0;
        }
        [x0, x1, x2, x3]
    }

    /// AVX2 has no unsigned 16-bit compare into a mask: max, equal, pack to bytes, one fix-up permutation, movemask.
    #[target_feature(enable = "avx2")]
    pub fn row256(row: &Row, threshold: u32, out: &mut [u32]) {
        let t = _mm256_set1_epi16(threshold as i16);
        for (tile, words) in out.chunks_exact_mut(4).enumerate() {
            let low = tile256(row, 16 * tile as u32);
            let high = tile256(row, 16 * tile as u32 + 8);
            for (word, (a, b)) in words.iter_mut().zip(low.into_iter().zip(high)) {
                let a = _mm256_cmpeq_epi16(_mm256_max_epu16(a, t), a);
                let b = _mm256_cmpeq_epi16(_mm256_max_epu16(b, t), b);
                let bytes = _mm256_permute4x64_epi64::<0xD8>(_mm256_packs_epi16(a, b));
                *word = _mm256_movemask_epi8(bytes) as u32;
            }
        }
    }
}

fn time(name: &str, mut work: impl FnMut(&mut [u32])) -> f64 {
    let mut out = vec![0u32; COLUMNS / 32 * ROWS];
    work(&mut out);
    let mut seconds: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let start = Instant::now();
            work(black_box(&mut out));
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    let nanoseconds = 1e9 * seconds[REPEATS / 2] / (COLUMNS * ROWS) as f64;
    println!("| {name} | {nanoseconds:.3} | {:.3} |", 1e9 * seconds[0] / (COLUMNS * ROWS) as f64);
    nanoseconds
}

fn main() {
    if cfg!(debug_assertions) {
        panic!("a debug build is not timed");
    }
    let key: SiteKey = Site { seed: 1, step: 2, branch: 0, layer: 3, site: 0 }.key().expect("within limits");
    let sample = 77u64;
    let shape = Shape { samples: &[sample], heads: 1, rows: ROWS, columns: COLUMNS };
    let engine = Engine::new(Level::Portable).expect("everywhere");
    let run = Run { engine, threads: 1, interrupted: &|| false };
    let mut expected = vec![0; ROWS * COLUMNS / 32];
    element(&run, key, shape, THRESHOLD, &mut expected).expect("within limits");
    println!("| variant | ns a decision, median of {REPEATS} | fastest |");
    println!("|---|---|---|");
    time("portable, shipped order (library)", |out| {
        element(&run, key, shape, THRESHOLD, out).expect("within limits");
    });
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    {
        let width = COLUMNS / 32;
        let prepared = |row: usize| key.row(Pattern::Element, sample, 0, row as u32);
        let counter = |row: usize| [row as u32, 0, sample as u32, 0];
        let rows = |out: &mut [u32], fill: &dyn Fn(usize, &mut [u32])| {
            out.chunks_exact_mut(width).enumerate().for_each(|(row, words)| fill(row, words));
        };
        let mut out = vec![0u32; width * ROWS];
        if is_x86_feature_detected!("avx512bw") {
            // SAFETY (all calls below): the features were detected just above.
            let shipped = |out: &mut [u32]| {
                rows(out, &|row, words| unsafe { simd::row512(&prepared(row), THRESHOLD, words) });
            };
            shipped(&mut out);
            assert!(out == expected, "AVX-512 differs from the library");
            time("AVX-512, shipped order (c1 varies)", shipped);
            time("AVX-512, c0 varies", |out| {
                rows(out, &|row, words| unsafe { simd::c0_varies512(counter(row), key.0, THRESHOLD, words) });
            });
            time("AVX-512, column = 8 block + lane", |out| {
                rows(out, &|row, words| unsafe { simd::naive512(&prepared(row), THRESHOLD, words) });
            });
        }
        if is_x86_feature_detected!("avx2") {
            let shipped = |out: &mut [u32]| {
                rows(out, &|row, words| unsafe { simd::row256(&prepared(row), THRESHOLD, words) });
            };
            shipped(&mut out);
            assert!(out == expected, "AVX2 differs from the library");
            time("AVX2, shipped order (c1 varies)", shipped);
        }
    }
}
