//! The order of an epoch as a pure function: a keyed permutation in constant memory. Stream `hko1`; `DESIGN.md` defines it.

use crate::error::{Error, Result, at_most};
use crate::rng::philox::philox4x32;
use crate::threads::Run;

/// The name of the stream. Changing any order is a new name.
pub const ORDER_STREAM: &str = "hko1";
/// Most samples of an epoch.
pub const MAX_SIZE: u64 = 1 << 62;
/// Largest epoch number.
pub const MAX_EPOCH: u64 = u32::MAX as u64;
/// Which order of an epoch: that of its samples, or (from 1 on) that of the batches of window `n - 1`.
pub const SAMPLES: u64 = 0;

/// "hko1". Bits 8-29 of a mask counter's last word are zero, and key derivation has all bits set: no counter is shared.
const TAG: u32 = 0x686B_6F31;
/// Up to here an order is shuffled outright: a Feistel network on so few points is no uniform permutation.
const SHUFFLED: u64 = 1 << 10;
const ROUNDS: usize = 8;
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
/// Places that one piece of work writes: about a hundred microseconds.
const PIECE: usize = 1 << 13;

/// A permutation of `0..size`.
#[derive(Debug, Clone)]
pub struct Order {
    size: u64,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Shuffled(Box<[u16]>),
    Feistel(Feistel),
}

impl Order {
    /// The order `which` of an epoch. `size` is 1..=2^62, `epoch` below 2^32.
    pub fn new(seed: u64, epoch: u64, which: u64, size: u64) -> Result<Self> {
        let epoch = at_most("epoch", epoch, MAX_EPOCH)? as u32;
        if at_most("size", size, MAX_SIZE)? == 0 {
            return Err(Error::Empty);
        }
        let words = Words::new(seed, epoch, which);
        let kind = if size <= SHUFFLED {
            Kind::Shuffled(shuffled(&words, size))
        } else {
            Kind::Feistel(Feistel::new(&words, size))
        };
        Ok(Order { size, kind })
    }

    /// The sample at a position below the size.
    #[inline]
    pub fn at(&self, position: u64) -> u64 {
        debug_assert!(position < self.size);
        match &self.kind {
            Kind::Shuffled(table) => u64::from(table[position as usize]),
            Kind::Feistel(network) => walk(position, self.size, |x| network.forward(x)),
        }
    }

    /// [`Order::at`] for a position that may lie anywhere.
    pub fn sample(&self, position: u64) -> Result<u64> {
        at_most("position", position, self.size - 1).map(|position| self.at(position))
    }

    /// The position of a sample: the inverse of [`Order::at`].
    pub fn position(&self, sample: u64) -> Result<u64> {
        at_most("sample", sample, self.size - 1)?;
        Ok(match &self.kind {
            Kind::Shuffled(table) => table.iter().position(|&at| u64::from(at) == sample).unwrap_or(0) as u64,
            Kind::Feistel(network) => walk(sample, self.size, |x| network.backward(x)),
        })
    }

    /// The samples at the positions from `start` on, as many as `out` has room for.
    pub fn fill(&self, run: &Run<'_>, start: u64, out: &mut [i64]) -> Result<()> {
        let Some(more) = out.len().checked_sub(1) else { return Ok(()) };
        at_most("position", start.saturating_add(more as u64), self.size - 1)?;
        let pieces = out.len().div_ceil(PIECE);
        run.for_each(out.chunks_mut(PIECE).enumerate(), pieces, |(piece, places)| {
            self.write(start + (piece * PIECE) as u64, places);
        })
    }

    /// [`Order::fill`] on the calling thread alone; all positions must be below the size.
    pub(super) fn fill_here(&self, start: u64, out: &mut [i64]) {
        for (piece, places) in out.chunks_mut(PIECE).enumerate() {
            self.write(start + (piece * PIECE) as u64, places);
        }
    }

    /// The samples at one piece's positions.
    fn write(&self, first: u64, places: &mut [i64]) {
        let Kind::Feistel(network) = &self.kind else {
            return (first..).zip(places).for_each(|(position, place)| *place = self.at(position) as i64);
        };
        (first..).zip(places.iter_mut()).for_each(|(position, place)| *place = network.forward(position) as i64);
        // Sweeps over those that fell outside, listed without a branch: one in two would be mispredicted.
        let mut outside = [0u16; PIECE];
        let mut count = places.len();
        for (index, place) in outside.iter_mut().take(count).enumerate() {
            *place = index as u16;
        }
        while count > 0 {
            let mut kept = 0;
            for at in 0..count {
                let index = outside[at];
                let place = &mut places[usize::from(index)];
                let is_outside = *place as u64 >= self.size;
                outside[kept] = index;
                kept += usize::from(is_outside);
            }
            for &index in &outside[..kept] {
                let place = &mut places[usize::from(index)];
                *place = network.forward(*place as u64) as i64;
            }
            count = kept;
        }
    }
}

/// Apply a permutation of a larger domain until it comes back into `0..size`: a permutation of that.
#[inline(always)]
fn walk(start: u64, size: u64, step: impl Fn(u64) -> u64) -> u64 {
    let mut x = step(start);
    while x >= size {
        x = step(x);
    }
    x
}

/// The random words of one order: Philox under a key of its own.
struct Words([u32; 2]);

impl Words {
    fn new(seed: u64, epoch: u32, which: u64) -> Self {
        let counter = [epoch, which as u32, (which >> 32) as u32, TAG];
        let [k0, k1, ..] = philox4x32(counter, [seed as u32, (seed >> 32) as u32]);
        Words([k0, k1])
    }

    fn block(&self, index: u32) -> [u32; 4] {
        philox4x32([index, 0, 0, TAG], self.0)
    }
}

/// Fisher and Yates' shuffle.
fn shuffled(words: &Words, size: u64) -> Box<[u16]> {
    let mut table: Box<[u16]> = (0..size as u16).collect();
    let mut block = [0; 4];
    for (drawn, last) in (1..table.len()).rev().enumerate() {
        if drawn % 4 == 0 {
            block = words.block((drawn / 4) as u32);
        }
        let choice = (u64::from(block[drawn % 4]) * (last as u64 + 1)) >> 32;
        table.swap(last, choice as usize);
    }
    table
}

/// A Feistel network whose halves differ by one bit at most: `left` above `right`.
#[derive(Debug, Clone)]
struct Feistel {
    keys: [(u64, u64); ROUNDS],
    left: u32,
    right: u32,
}

impl Feistel {
    fn new(words: &Words, size: u64) -> Self {
        let bits = u64::BITS - (size - 1).leading_zeros();
        let keys = std::array::from_fn(|round| {
            let [a, b, c, d] = words.block(round as u32).map(u64::from);
            (a | b << 32, c | d << 32 | 1)
        });
        Feistel { keys, left: bits - bits / 2, right: bits / 2 }
    }

    /// `bits` bits of a hash of one half: a multiplicative hash under the round's own addend and odd factor, and a second
    /// multiplication, because the first one's output is linear in its input.
    #[inline(always)]
    fn hash(&self, round: usize, half: u64, bits: u32) -> u64 {
        let (addend, factor) = self.keys[round];
        let mixed = half.wrapping_add(addend).wrapping_mul(factor);
        (mixed ^ mixed >> 32).wrapping_mul(GOLDEN) >> (u64::BITS - bits)
    }

    #[inline(always)]
    fn forward(&self, x: u64) -> u64 {
        let (mut high, mut low) = self.split(x);
        for round in (0..ROUNDS).step_by(2) {
            high ^= self.hash(round, low, self.left);
            low ^= self.hash(round + 1, high, self.right);
        }
        high << self.right | low
    }

    #[inline(always)]
    fn backward(&self, x: u64) -> u64 {
        let (mut high, mut low) = self.split(x);
        for round in (0..ROUNDS).step_by(2).rev() {
            low ^= self.hash(round + 1, high, self.right);
            high ^= self.hash(round, low, self.left);
        }
        high << self.right | low
    }

    #[inline(always)]
    fn split(&self, x: u64) -> (u64, u64) {
        (x >> self.right, x & ((1 << self.right) - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::digest;
    use crate::mask::vectors;
    use proptest::prelude::*;

    fn filled(order: &Order, start: u64, count: usize, threads: usize) -> Vec<i64> {
        let mut out = vec![-1; count];
        order.fill(&Run { threads, ..Run::new().unwrap() }, start, &mut out).unwrap();
        out
    }

    #[test]
    fn known_orders() {
        let mut seen = 0;
        for line in vectors("order.txt").iter().filter(|line| line[0] != "schedule") {
            let n: Vec<u64> = line[1..5].iter().map(|word| word.parse().unwrap()).collect();
            let order = Order::new(n[0], n[1], n[2], n[3]).unwrap();
            if line[0] == "whole" {
                assert_eq!(digest(&filled(&order, 0, n[3] as usize, 1)), line[5], "{line:?}");
            } else {
                let position = line[5].parse().unwrap();
                assert_eq!(order.at(position).to_string(), line[6], "{line:?}");
                assert_eq!(order.position(order.at(position)), Ok(position));
            }
            seen += 1;
        }
        assert!(seen >= 390, "the vector file is too short");
    }

    proptest! {
        /// An inverse on both sides: no two positions share a sample, and none is left out.
        #[test]
        fn positions_and_samples_are_one_to_one(
            seed: u64, epoch: u32, which: u64, bits in 0..=62u32, below: u64, place: u64
        ) {
            let size = (1u64 << bits) - below % (1u64 << bits) / 2;
            let order = Order::new(seed, u64::from(epoch), which, size).unwrap();
            let place = place % size;
            prop_assert!(order.at(place) < size);
            prop_assert_eq!(order.position(order.at(place)), Ok(place));
            prop_assert_eq!(order.at(order.position(place).unwrap()), place);
        }

        #[test]
        fn small_orders_hold_every_sample(seed: u64, size in 1..6000u64) {
            let order = Order::new(seed, 1, 0, size).unwrap();
            let mut samples = filled(&order, 0, size as usize, 1);
            samples.sort_unstable();
            prop_assert!(samples.into_iter().eq(0..size as i64));
        }

        /// Pieces, threads and sweeps over what fell outside change nothing.
        #[test]
        fn a_slice_is_its_places(seed: u64, size in 40_000..80_000u64, start in 0..8200u64, threads in 1..4usize) {
            let order = Order::new(seed, 2, 0, size).unwrap();
            let slice = filled(&order, start, 31_000, threads);
            prop_assert!(slice.iter().zip(start..).all(|(&sample, position)| sample as u64 == order.at(position)));
            let mut alone = vec![0; 31_000];
            order.fill_here(start, &mut alone);
            prop_assert_eq!(slice, alone);
        }
    }

    /// All 120 permutations of five, equally often over seeds, epochs and windows: chi-square with 119 degrees of freedom.
    #[test]
    fn every_permutation_is_drawn_equally_often() {
        let mut counts = std::collections::HashMap::new();
        let draws = 60_000u64;
        for draw in 0..draws {
            let (seed, epoch, which) = [(draw, 0, 0), (7, draw, 0), (7, 0, draw)][(draw % 3) as usize];
            *counts.entry(filled(&Order::new(seed, epoch, which, 5).unwrap(), 0, 5, 1)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 120);
        let expected = draws as f64 / 120.0;
        let chi: f64 = counts.values().map(|&n: &i32| (f64::from(n) - expected).powi(2) / expected).sum();
        assert!((chi - 119.0).abs() < 5.0 * (2.0 * 119.0f64).sqrt(), "{chi}");
    }

    #[test]
    fn what_is_no_order_is_refused() {
        assert_eq!(Order::new(0, 0, 0, 0).unwrap_err(), Error::Empty);
        assert!(Order::new(0, 0, 0, MAX_SIZE).is_ok());
        let beyond = Order::new(0, 0, 0, MAX_SIZE + 1).unwrap_err();
        assert_eq!(beyond, Error::Range { name: "size", value: MAX_SIZE + 1, most: MAX_SIZE });
        assert!(Order::new(0, MAX_EPOCH, 0, 9).is_ok());
        assert!(Order::new(0, MAX_EPOCH + 1, 0, 9).is_err());
        let order = Order::new(0, 0, 0, 9).unwrap();
        assert_eq!(order.sample(9), Err(Error::Range { name: "position", value: 9, most: 8 }));
        assert!(order.sample(8).is_ok() && order.position(8).is_ok() && order.position(9).is_err());
        let run = Run::new().unwrap();
        assert_eq!(order.fill(&run, u64::MAX, &mut []), Ok(()));
        assert!(order.fill(&run, 0, &mut [0; 9]).is_ok());
        assert!(order.fill(&run, 1, &mut [0; 9]).is_err() && order.fill(&run, u64::MAX, &mut [0; 2]).is_err());
    }
}
