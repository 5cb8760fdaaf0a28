//! Stream `hk1`: what every bit of the key and the counter means. The table stands in `DESIGN.md`.

use super::philox::{Row, philox4x32};
use crate::error::{Result, at_most};

/// Largest sample id.
pub const MAX_SAMPLE: u64 = (1 << 40) - 1;
/// Most rows or columns of a mask.
pub const MAX_EXTENT: u64 = 1 << 20;
/// Most heads.
pub const MAX_HEADS: u64 = 1 << 10;
/// Largest layer number.
pub const MAX_LAYER: u64 = (1 << 10) - 1;
/// Largest site code.
pub const MAX_SITE: u64 = (1 << 6) - 1;
/// Largest branch number.
pub const MAX_BRANCH: u64 = (1 << 8) - 1;

/// Columns a tile of 16 counters covers.
pub const TILE: usize = 128;
const FEISTEL_ROUNDS: u32 = 4;
/// No mask counter has this word: it keeps key derivation apart from masks.
const DERIVE_TAG: u32 = u32::MAX;

/// What a mask is of: everything but the sample and the place in the mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// The user's seed.
    pub seed: u64,
    /// The optimiser step.
    pub step: u64,
    /// The pass of a two-pass loss.
    pub branch: u64,
    /// The layer within its stack.
    pub layer: u64,
    /// The code of the place in the layer.
    pub site: u64,
}

/// A pattern's tag in the counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Pattern {
    /// Every (row, column) on its own.
    Element = 0,
    /// Whole columns.
    Column = 1,
    /// One block of columns.
    Span = 2,
}

/// The Philox key of one site: masks of two sites of one seed never share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SiteKey(pub [u32; 2]);

impl Site {
    /// Derive the site's key: a four-round Feistel network over (step, layer | site | branch) under the seed.
    pub fn key(&self) -> Result<SiteKey> {
        let step = at_most("step", self.step, u64::from(u32::MAX))? as u32;
        let layer = at_most("layer", self.layer, MAX_LAYER)?;
        let site = at_most("site", self.site, MAX_SITE)?;
        let branch = at_most("branch", self.branch, MAX_BRANCH)?;
        let seed = [self.seed as u32, (self.seed >> 32) as u32];
        let (mut left, mut right) = (step, (layer | site << 10 | branch << 16) as u32);
        for r in 0..FEISTEL_ROUNDS {
            let mixed = philox4x32([right, r, 0, DERIVE_TAG], seed)[0];
            (left, right) = (right, left ^ mixed);
        }
        Ok(SiteKey([left, right]))
    }
}

impl SiteKey {
    /// The counters of one mask row, ready for any block. Arguments must be within the stream's limits.
    #[inline]
    pub fn row(&self, pattern: Pattern, sample: u64, head: u32, row: u32) -> Row {
        let [c0, c2, c3] = counter(pattern, sample, head, row);
        Row::new(c0, c2, c3, self.0)
    }

    /// The 32-bit draw of a span's start.
    pub fn span_draw(&self, sample: u64, head: u32) -> u32 {
        let [c0, c2, c3] = counter(Pattern::Span, sample, head, 0);
        philox4x32([c0, 0, c2, c3], self.0)[0]
    }
}

/// The words of the counter beside c1, which is the block.
#[inline(always)]
fn counter(pattern: Pattern, sample: u64, head: u32, row: u32) -> [u32; 3] {
    debug_assert!(sample <= MAX_SAMPLE && u64::from(head) < MAX_HEADS && u64::from(row) < MAX_EXTENT);
    [row | head << 20, sample as u32, (sample >> 32) as u32 | (pattern as u32) << 30]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn known_keys() {
        let mut seen = 0;
        for line in crate::mask::vectors("keys.txt") {
            let n: Vec<u64> = line[..5].iter().map(|w| w.parse().unwrap()).collect();
            let key = Site { seed: n[0], step: n[1], branch: n[2], layer: n[3], site: n[4] }.key().unwrap();
            assert_eq!(format!("{:08x}{:08x}", key.0[0], key.0[1]), line[5]);
            seen += 1;
        }
        assert!(seen >= 10, "the vector file is empty");
    }

    /// The inverse of the Feistel network: that it exists is why two sites cannot collide.
    fn invert(seed: u64, key: SiteKey) -> (u32, u32) {
        let [mut left, mut right] = key.0;
        for r in (0..FEISTEL_ROUNDS).rev() {
            let mixed = philox4x32([left, r, 0, DERIVE_TAG], [seed as u32, (seed >> 32) as u32])[0];
            (left, right) = (right ^ mixed, left);
        }
        (left, right)
    }

    proptest! {
        #[test]
        fn a_key_gives_its_site_back(seed: u64, step: u32, branch in 0..256u64, layer in 0..1024u64, site in 0..64u64) {
            let key = Site { seed, step: u64::from(step), branch, layer, site }.key().unwrap();
            let (left, right) = invert(seed, key);
            prop_assert_eq!(left, step);
            prop_assert_eq!(u64::from(right), layer | site << 10 | branch << 16);
        }
    }

    proptest! {
        /// Within a key, two places never share a counter, nor is one a counter of a key's derivation.
        #[test]
        fn a_counter_gives_its_place_back(
            sample in 0..=MAX_SAMPLE, head in 0..MAX_HEADS as u32, row in 0..MAX_EXTENT as u32, tag in 0..3usize
        ) {
            let pattern = [Pattern::Element, Pattern::Column, Pattern::Span][tag];
            let [c0, c2, c3] = counter(pattern, sample, head, row);
            prop_assert_eq!((c0 & 0xF_FFFF, c0 >> 20), (row, head));
            prop_assert_eq!(u64::from(c3 & 0xFF) << 32 | u64::from(c2), sample);
            prop_assert_eq!((c3 >> 30, c3 & 0x3FFF_FF00), (tag as u32, 0));
            prop_assert_ne!(c3, DERIVE_TAG);
        }
    }

    /// Every column of a row has a lane of its own: one of two halves, of four words, of a block.
    #[test]
    fn columns_do_not_share_a_lane() {
        let lane = |column: u32| (16 * (column / 128) + column % 32 / 2, column % 128 / 32, column % 2);
        let lanes: HashSet<_> = (0..MAX_EXTENT as u32).map(lane).collect();
        assert_eq!(lanes.len() as u64, MAX_EXTENT);
        assert!(lanes.iter().all(|(block, ..)| *block < 1 << 17));
    }

    #[test]
    fn neighbouring_sites_have_keys_of_their_own() {
        let mut keys = HashSet::new();
        for step in 0..8 {
            for branch in 0..3 {
                for layer in 0..32 {
                    for site in 0..10 {
                        keys.insert(Site { seed: 5, step, branch, layer, site }.key().unwrap().0);
                    }
                }
            }
        }
        assert_eq!(keys.len(), 8 * 3 * 32 * 10);
    }

    #[test]
    fn values_beyond_the_counter_are_refused() {
        let site = Site { seed: u64::MAX, step: u64::from(u32::MAX), branch: 255, layer: 1023, site: 63 };
        assert!(site.key().is_ok());
        let beyond = Site { layer: 1024, ..site }.key();
        assert_eq!(beyond, Err(Error::Range { name: "layer", value: 1024, most: 1023 }));
        assert!(Site { step: 1 << 32, ..site }.key().is_err());
        assert!(Site { branch: 256, ..site }.key().is_err());
        assert!(Site { site: 64, ..site }.key().is_err());
    }
}
