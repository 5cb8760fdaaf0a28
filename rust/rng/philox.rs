//! Philox4x32-10 (Salmon et al., SC 2011; conventions of Random123).

pub(crate) const M0: u32 = 0xD251_1F53;
pub(crate) const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;
pub(crate) const ROUNDS: u32 = 10;

/// How many consecutive counters make a tile: one 512-bit register a word.
pub const LANES: usize = 16;

#[inline(always)]
pub(crate) fn mul(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

#[inline(always)]
fn round_key(key: [u32; 2], round: u32) -> [u32; 2] {
    [key[0].wrapping_add(W0.wrapping_mul(round)), key[1].wrapping_add(W1.wrapping_mul(round))]
}

#[inline(always)]
pub(crate) fn round(c: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (hi0, lo0) = mul(M0, c[0]);
    let (hi1, lo1) = mul(M1, c[2]);
    [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
}

/// The four output words of one counter.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    (0..ROUNDS).fold(counter, |c, r| round(c, round_key(key, r)))
}

/// The counters (c0, *, c2, c3) of one mask row under one key, prepared for many values of c1.
///
/// c1 enters the first round by an xor alone, so both products of that round, and one of each of the next two, are
/// the same for the whole row: 16 of 20 multiplications remain. Three rounds then read
///
/// ```text
/// h0, l0 = M0 * (c1 ^ x0)        h1, l1 = M1 * (h0 ^ y2)        words = (h1 ^ z0, l1, l0 ^ z2, z3)
/// ```
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Row {
    pub key: [u32; 2],
    pub x0: u32,
    pub y2: u32,
    pub z0: u32,
    pub z2: u32,
    pub z3: u32,
}

impl Row {
    /// Do the arithmetic that does not depend on c1.
    pub fn new(c0: u32, c2: u32, c3: u32, key: [u32; 2]) -> Self {
        let [k1, k2] = [round_key(key, 1), round_key(key, 2)];
        let x = round([c0, 0, c2, c3], key);
        let (y_hi, y1) = mul(M1, x[2]);
        let (z_hi, z3) = mul(M0, y_hi ^ x[1] ^ k1[0]);
        Row { key, x0: x[0], y2: x[3] ^ k1[1], z0: y1 ^ k2[0], z2: z_hi ^ k2[1], z3 }
    }

    /// The key of one round.
    #[inline(always)]
    pub(crate) fn round_key(&self, round: u32) -> [u32; 2] {
        round_key(self.key, round)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        let mut seen = 0;
        for line in crate::mask::vectors("philox.txt") {
            let words: Vec<u32> = line.iter().map(|w| u32::from_str_radix(w, 16).unwrap()).collect();
            let counter = [words[0], words[1], words[2], words[3]];
            assert_eq!(philox4x32(counter, [words[4], words[5]]).as_slice(), &words[6..10]);
            seen += 1;
        }
        assert!(seen >= 3, "the vector file is empty");
    }
}
