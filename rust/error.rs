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
    /// There must be one length a sample.
    Lengths {
        /// Lengths given.
        lengths: usize,
        /// Samples given.
        samples: usize,
    },
    /// Words that do not hold rows of this many columns.
    Words {
        /// Words given a row.
        words: usize,
        /// Columns asked for.
        columns: usize,
    },
    /// The mask would not fit into memory.
    Memory {
        /// The product of the mask's dimensions, in 32-bit words (saturating).
        words: u128,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Range { name, value, most } => {
                write!(f, "{name} must lie in 0..={most} (got {value}); stay within the stream's limits")
            }
            Error::Rate(rate) => write!(f, "rate must be a number in [0, 1] (got {rate}); 0 drops nothing"),
            Error::Lengths { lengths, samples } => {
                write!(f, "there must be one length a sample (got {lengths} lengths for {samples} samples); pass both")
            }
            Error::Words { words, columns } => write!(
                f,
                "rows of packed words do not hold that many columns (got {words} words a row for {columns} columns); \
                 pass ceil(columns / 32) words a row"
            ),
            Error::Memory { words } => {
                write!(f, "the mask does not fit into memory (got {words} words of 4 bytes); draw fewer rows at a time")
            }
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
        assert!(Error::Lengths { lengths: 1, samples: 2 }.to_string().contains("1 lengths for 2 samples"));
        assert!(Error::Words { words: 1, columns: 33 }.to_string().contains("1 words a row for 33 columns"));
        assert!(Error::Memory { words: 7 }.to_string().contains("got 7 words"));
    }

    #[test]
    fn at_most_includes_the_bound() {
        assert_eq!(at_most("x", 3, 3), Ok(3));
        assert_eq!(at_most("x", 4, 3), Err(Error::Range { name: "x", value: 4, most: 3 }));
    }
}
