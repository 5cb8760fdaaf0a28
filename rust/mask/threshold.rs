//! Rates as integers.

use crate::error::{Error, Result};

/// Steps between rate 0 and rate 1.
pub const LEVELS: u32 = 1 << 16;

/// The integer that a 16-bit lane must reach to be kept: floor(65536 rate + 0.5). 0 and 1 are exact.
pub fn threshold(rate: f64) -> Result<u32> {
    if !(0.0..=1.0).contains(&rate) {
        return Err(Error::Rate(rate));
    }
    Ok((f64::from(LEVELS) * rate + 0.5).floor() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_half_up_and_keeps_the_ends() {
        let cases = [(0.0, 0), (1.0, 65536), (0.5, 32768), (0.1, 6554), (0.5 / 65536.0, 1), (0.49 / 65536.0, 0)];
        for (rate, expected) in cases {
            assert_eq!(threshold(rate), Ok(expected), "{rate}");
        }
        for bad in [-1e-9, 1.000_001, f64::NAN, f64::INFINITY] {
            assert!(threshold(bad).is_err());
        }
    }
}
