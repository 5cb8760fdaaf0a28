//! The instruction sets: the same loops for AVX-512, AVX2 and portable Rust, chosen at run time.
//!
//! Everything that is `unsafe` in this crate stands in this folder. An [`Engine`] can only be made for
//! an instruction set that the processor has, which is what makes the calls into the `#[target_feature]` code sound.

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod avx2;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod avx512;
mod loops;
#[allow(unsafe_code)]
mod mode;
mod portable;
#[cfg(target_arch = "x86_64")]
mod sse2;

use crate::error::{Error, Result};
use crate::rng::philox::Row;
use std::sync::OnceLock;

pub(crate) use mode::Mode;

/// A number that dropout can be applied to.
pub trait Float: Copy + Send + Sync {
    /// What dropped places become.
    const ZERO: Self;
    /// Widen to float32, exactly.
    fn widen(self) -> f32;
    /// Round to nearest even; every NaN becomes the quiet NaN that torch writes.
    fn round(wide: f32) -> Self;
    /// [`Engine::apply`] for this type.
    fn apply(engine: Engine, x: &[Self], words: &[u32], scale: f32, out: &mut [Self], store: Store);
}

/// How results reach memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// Through the cache.
    Cached,
    /// Around it: a cache line that is written whole need not be read first. For results too large to be found there again.
    /// This crate's own, as [`Store::arrive`] must follow.
    #[non_exhaustive]
    Around,
}

impl Store {
    /// The better way for a result of so many bytes: past half of a last-level cache of usual size, around it.
    pub(crate) fn of(bytes: usize) -> Self {
        if bytes >= 16 << 20 { Store::Around } else { Store::Cached }
    }

    /// What went around the cache must have arrived before another thread is told that the work is done: call this at the
    /// end of a piece of work. (Once a row would make every row wait.)
    #[inline]
    pub(crate) fn arrive(self) {
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        if self == Store::Around {
            // SAFETY: every x86-64 processor has SSE.
            unsafe { std::arch::x86_64::_mm_sfence() };
        }
    }
}

/// The environment variable that forces an instruction set.
pub const VARIABLE: &str = "HIDDENKEY_SIMD";

/// An instruction set that masks can be made with. All of them make the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Rust that the compiler vectorises for the target's baseline.
    Portable,
    /// x86-64 with AVX2.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Level {
    /// Every level, slowest first.
    pub const ALL: [Level; 3] = [Level::Portable, Level::Avx2, Level::Avx512];

    /// The name that [`VARIABLE`] knows it by.
    pub const fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        }
    }

    /// Whether this processor (and operating system) has it.
    pub fn available(self) -> bool {
        match self {
            Level::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("popcnt"),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                Level::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx2 | Level::Avx512 => false,
        }
    }
}

/// A level that this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Engine(Level);

impl Engine {
    /// The engine of a level, or an error where the processor lacks it.
    pub fn new(level: Level) -> Result<Self> {
        if level.available() { Ok(Engine(level)) } else { Err(Error::Simd(level.name().to_owned())) }
    }

    /// The fastest engine, or the one that [`VARIABLE`] forces. Read once.
    pub fn chosen() -> Result<Self> {
        static CHOSEN: OnceLock<Result<Engine>> = OnceLock::new();
        let asked = || std::env::var_os(VARIABLE).map(|name| name.to_string_lossy().into_owned());
        CHOSEN.get_or_init(|| Self::forced(asked().as_deref())).clone()
    }

    fn forced(name: Option<&str>) -> Result<Self> {
        match name {
            None | Some("") => {
                Ok(Engine(Level::ALL.into_iter().rfind(|level| level.available()).unwrap_or(Level::Portable)))
            }
            Some(name) => match Level::ALL.into_iter().find(|level| level.name() == name) {
                Some(level) => Self::new(level),
                None => Err(Error::Simd(name.to_owned())),
            },
        }
    }

    /// The level.
    pub fn level(self) -> Level {
        self.0
    }
}

/// Ask for the memory that will be read a page after `x`. The processor's own prefetchers stop at a page's
/// end, and while a row's bits are drawn nothing else would wait for the next page.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[inline(always)]
fn fetch_ahead<F, const N: usize>(x: &[F; N]) {
    const AHEAD: usize = 4096;
    for line in (0..size_of::<[F; N]>()).step_by(64) {
        // SAFETY: every x86-64 processor has SSE, and a prefetch reads nothing: it may name any address.
        unsafe { std::arch::x86_64::_mm_prefetch::<3>(x.as_ptr().cast::<i8>().wrapping_add(AHEAD + line)) };
    }
}

/// Calls a function of the engine's own module. The `unsafe` is sound because an [`Engine`] proves its level.
macro_rules! dispatch {
    ($engine:expr, $name:ident($($argument:expr),*)) => {
        match $engine.0 {
            Level::Portable => portable::$name($($argument),*),
            // SAFETY: `Engine::new` and `Engine::forced` check that the processor has the level's features.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Level::Avx2 => unsafe { avx2::$name($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Level::Avx512 => unsafe { avx512::$name($($argument),*) },
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx2 | Level::Avx512 => unreachable!("never available on this architecture"),
        }
    };
}

impl Float for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn round(wide: f32) -> Self {
        wide
    }
    #[inline]
    fn apply(engine: Engine, x: &[f32], words: &[u32], scale: f32, out: &mut [f32], store: Store) {
        dispatch!(engine, apply_f32(x, words, scale, out, store));
    }
}

/// bfloat16, as its bits.
impl Float for u16 {
    const ZERO: Self = 0;
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
    #[inline(always)]
    fn round(wide: f32) -> Self {
        let bits = wide.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
        (if wide.is_nan() { 0x7FC0 } else { rounded }) as u16
    }
    #[inline]
    fn apply(engine: Engine, x: &[u16], words: &[u32], scale: f32, out: &mut [u16], store: Store) {
        dispatch!(engine, apply_bf16(x, words, scale, out, store));
    }
}

impl Engine {
    /// Draw packed bits of one mask row from its tile `tile` on: a tile of 16 counters gives 4 words.
    ///
    /// `threshold` lies in 1..=65535. Bits past the last column are not cleared.
    #[inline]
    pub fn fill(self, row: &Row, tile: usize, threshold: u16, out: &mut [u32]) {
        dispatch!(self, fill(row, tile as u32, threshold, out));
    }

    /// Packed bits of one row to one byte, 0 or 1, a column. `words` has at least ceil(out.len() / 32) words.
    #[inline]
    pub fn unpack(self, words: &[u32], out: &mut [u8]) {
        assert!(words.len() * 32 >= out.len());
        dispatch!(self, unpack(words, out));
    }

    /// How many bits are set.
    #[inline]
    pub fn count(self, words: &[u32]) -> u32 {
        dispatch!(self, count(words))
    }

    /// 32-bit integers to 64 bits. False if one of them is not in `0..=last`.
    #[inline]
    pub fn widen_ids(self, x: &[i32], last: i32, out: &mut [i64]) -> bool {
        assert!(x.len() == out.len());
        dispatch!(self, widen_ids(x, last, out))
    }

    /// `out = keep ? x * scale : 0`, the product in float32 and rounded to nearest even.
    #[inline]
    pub fn apply<F: Float>(self, x: &[F], words: &[u32], scale: f32, out: &mut [F], store: Store) {
        assert!(x.len() == out.len() && words.len() * 32 >= out.len());
        F::apply(self, x, words, scale, out, store);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::philox::philox4x32;
    use proptest::prelude::*;

    fn engines() -> Vec<Engine> {
        Level::ALL.into_iter().filter_map(|level| Engine::new(level).ok()).collect()
    }

    /// Column c of a row, from the definition.
    fn keep(c0: u32, c2: u32, c3: u32, key: [u32; 2], column: usize, threshold: u16) -> bool {
        let inside = column % 128;
        let counter = 16 * (column / 128) as u32 + (inside % 32 / 2) as u32;
        let word = philox4x32([c0, counter, c2, c3], key)[inside / 32];
        (word >> (16 * (column % 2)) & 0xFFFF) as u16 >= threshold
    }

    proptest! {
        #[test]
        fn every_engine_draws_the_definition(
            c: [u32; 3], key: [u32; 2], tile in 0..70usize, words in 0..13usize, threshold in 1..=u16::MAX
        ) {
            let row = Row::new(c[0], c[1], c[2], key);
            let mut drawn: Vec<(Vec<u32>, String)> = vec![];
            for engine in engines() {
                let mut out = vec![0; words];
                engine.fill(&row, tile, threshold, &mut out);
                drawn.push((out, format!("{engine:?}")));
            }
            let mut out = vec![0; words];
            portable::plain_fill(&row, tile as u32, threshold, &mut out);
            drawn.push((out, "plain Rust".to_owned()));
            for (out, engine) in drawn {
                for column in 0..32 * words {
                    let expected = keep(c[0], c[1], c[2], key, 128 * tile + column, threshold);
                    prop_assert_eq!(out[column / 32] >> (column % 32) & 1 == 1, expected, "{:?} {}", engine, column);
                }
            }
        }

        #[test]
        fn every_engine_unpacks_and_counts(words: Vec<u32>, cut in 0..40usize) {
            let columns = (32 * words.len()).saturating_sub(cut);
            for engine in engines() {
                let mut out = vec![7; columns];
                engine.unpack(&words, &mut out);
                for (column, byte) in out.into_iter().enumerate() {
                    prop_assert_eq!(u32::from(byte), words[column / 32] >> (column % 32) & 1);
                }
                prop_assert_eq!(engine.count(&words), words.iter().map(|w| w.count_ones()).sum::<u32>());
            }
        }

        #[test]
        fn every_engine_widens(x: Vec<i32>, last in 0..=i32::MAX, at: usize, value in -2..=1i32) {
            let mut within: Vec<i32> = x.iter().map(|x| x & i32::MAX).map(|x| x.min(last)).collect();
            if !within.is_empty() {
                let at = at % within.len();
                within[at] = if value < 0 { value } else { last.wrapping_add(value) }; // the bounds, and next to them
            }
            for engine in engines() {
                for x in [&x, &within] {
                    let mut out = vec![7; x.len()];
                    let known = engine.widen_ids(x, last, &mut out);
                    prop_assert_eq!(known, x.iter().all(|x| (0..=last).contains(x)));
                    prop_assert!(out.iter().zip(x).all(|(&y, &x)| y == i64::from(x)));
                }
            }
        }

        #[test]
        fn every_engine_applies(words: [u32; 5], bits: Vec<u32>, scale in 1.0f32..4.0, around: bool) {
            let store = if around { Store::Around } else { Store::Cached };
            let x: Vec<f32> = bits.iter().take(150).map(|&b| f32::from_bits(b)).collect();
            let halves: Vec<u16> = x.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
            for engine in engines() {
                let (mut out, mut half) = (vec![9.0; x.len()], vec![9; x.len()]);
                engine.apply(&x, &words, scale, &mut out, store);
                engine.apply(&halves, &words, scale, &mut half, store);
                for i in 0..x.len() {
                    let kept = words[i / 32] >> (i % 32) & 1 == 1;
                    let expected = if kept { x[i] * scale } else { 0.0 };
                    prop_assert!(out[i].to_bits() == expected.to_bits() || out[i].is_nan() && expected.is_nan());
                    let wide = f32::from_bits(u32::from(halves[i]) << 16) * scale;
                    let expected = if kept { u16::round(wide) } else { 0 };
                    prop_assert_eq!(half[i], expected);
                }
            }
        }
    }

    #[test]
    fn bfloat16_rounds_to_nearest_even_and_keeps_nan() {
        let cases = [
            (0x3F80_0000, 0x3F80),
            (0x3F80_8000, 0x3F80),
            (0x3F81_8000, 0x3F82),
            (0x3F80_8001, 0x3F81),
            (0x7F80_0000, 0x7F80),
            (0x7F7F_FFFF, 0x7F80),
            (0x7F80_0001, 0x7FC0),
            (0xFFC0_0000, 0x7FC0),
        ];
        for (wide, narrow) in cases {
            assert_eq!(u16::round(f32::from_bits(wide)), narrow, "{wide:08x}");
        }
    }

    #[test]
    fn every_bfloat16_number_is_scaled_as_defined() {
        let x: Vec<u16> = (0..=u16::MAX).collect();
        let words = vec![u32::MAX; x.len() / 32];
        for (scale, engine) in
            [1.0, 1.1, 1.25, 3.0].into_iter().flat_map(|s| engines().into_iter().map(move |e| (s, e)))
        {
            let mut out = vec![9; x.len()];
            engine.apply(&x, &words, scale, &mut out, Store::Around);
            let wrong = x.iter().zip(&out).find(|&(&x, &y)| y != u16::round(x.widen() * scale));
            assert_eq!(wrong, None, "{engine:?} {scale}");
        }
    }

    #[test]
    fn an_unknown_or_missing_level_is_an_error() {
        assert_eq!(Engine::forced(Some("sse9")), Err(Error::Simd("sse9".to_owned())));
        assert_eq!(Engine::forced(Some("portable")), Ok(Engine(Level::Portable)));
        assert!(Engine::forced(None).is_ok());
        for level in Level::ALL {
            assert_eq!(Engine::new(level).is_ok(), level.available());
        }
    }
}
