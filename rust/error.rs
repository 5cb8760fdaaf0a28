//! Everything that can be wrong with an argument.

use std::fmt;

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

/// A bad argument. Messages name the value and the way out.
#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// An integer lies outside `0..=most`.
    Range {
        /// What the value is.
        name: &'static str,
        /// The value.
        value: u64,
        /// The largest that is allowed.
        most: u64,
    },
    /// A rate is no number in [0, 1].
    Rate(f64),
    /// A scale is no finite number above 0.
    Scale(f32),
    /// There must be one length a sample.
    Lengths {
        /// Lengths given.
        lengths: usize,
        /// Samples given.
        samples: usize,
    },
    /// Packed words that are no rows of this many columns, or memory of another size for them.
    Words {
        /// Words given.
        words: usize,
        /// Columns asked for.
        columns: usize,
        /// Places given to unpack into.
        given: usize,
    },
    /// Memory of another size than the work needs.
    Memory {
        /// Places given.
        given: usize,
        /// Places needed (saturating).
        wanted: u128,
    },
    /// No such instruction set, or not on this processor.
    Simd(String),
    /// The caller asked to stop.
    Interrupted,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Range { name, value, most } => {
                write!(f, "{name} must lie in 0..={most} (got {value}); stay within the stream's limits")
            }
            Error::Rate(rate) => write!(f, "rate must be a number in [0, 1] (got {rate}); 0 drops nothing"),
            Error::Scale(scale) => write!(f, "scale must be a finite number above 0 (got {scale}); 1 rescales nothing"),
            Error::Lengths { lengths, samples } => {
                write!(f, "there must be one length a sample (got {lengths} lengths for {samples} samples); pass both")
            }
            Error::Words { words, columns, given } => write!(
                f,
                "packed words do not hold rows of that many columns (got {words} words of {columns} columns a row for \
                 {given} places); pass ceil(columns / 32) words a row"
            ),
            Error::Memory { given, wanted } => {
                write!(f, "memory and shape disagree (got room for {given} places, not {wanted}); pass arrays that fit")
            }
            Error::Simd(name) => write!(
                f,
                "HIDDENKEY_SIMD names no instruction set of this processor (got {name:?}); use portable, avx2 or avx512, \
                 or unset it for the fastest"
            ),
            Error::Interrupted => write!(f, "the call was interrupted (got a stop request); nothing was returned"),
        }
    }
}

impl std::error::Error for Error {}

/// `value` if it is at most `most`.
pub(crate) fn at_most(name: &'static str, value: u64, most: u64) -> Result<u64> {
    if value <= most { Ok(value) } else { Err(Error::Range { name, value, most }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_value_and_the_way_out() {
        let range = Error::Range { name: "layer", value: 1024, most: 1023 };
        assert_eq!(range.to_string(), "layer must lie in 0..=1023 (got 1024); stay within the stream's limits");
        assert!(Error::Rate(f64::NAN).to_string().contains("got NaN"));
        assert!(Error::Scale(-1.0).to_string().contains("got -1"));
        assert!(Error::Lengths { lengths: 1, samples: 2 }.to_string().contains("1 lengths for 2 samples"));
        let words = Error::Words { words: 1, columns: 33, given: 33 };
        assert!(words.to_string().contains("got 1 words of 33 columns a row for 33 places"));
        assert!(Error::Memory { given: 7, wanted: 8 }.to_string().contains("got room for 7 places, not 8"));
        assert!(Error::Simd("sse9".into()).to_string().contains("got \"sse9\""));
        assert!(Error::Interrupted.to_string().contains("interrupted"));
    }

    #[test]
    fn at_most_includes_the_bound() {
        assert_eq!(at_most("x", 3, 3), Ok(3));
        assert_eq!(at_most("x", 4, 3), Err(Error::Range { name: "x", value: 4, most: 3 }));
    }
}
