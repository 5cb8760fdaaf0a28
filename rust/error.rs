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
    /// An integer that counts is below 0.
    Negative {
        /// What the value is.
        name: &'static str,
        /// The value.
        value: i64,
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
    /// There is not so much memory.
    Room {
        /// Numbers that it was wanted for.
        numbers: usize,
    },
    /// An epoch of nothing.
    Empty,
    /// A sample that does not fit a batch's tokens.
    Budget {
        /// The sample.
        sample: u64,
        /// Its length.
        length: u64,
        /// Tokens that a batch may have.
        budget: u64,
    },
    /// A row's capacity is 0, or beyond what a histogram of lengths holds.
    Capacity(u64),
    /// More documents, or pieces of documents, than are packed at once.
    Pieces(u64),
    /// A document's length is below 0.
    NegativeLength {
        /// Its number.
        document: usize,
        /// Its length.
        length: i64,
    },
    /// A document does not fit into a row.
    TooLong {
        /// Its number.
        document: usize,
        /// Its length.
        length: u64,
        /// A row's.
        capacity: u64,
    },
    /// A row number that is none of the store's (and is not -1, a padding row).
    Row {
        /// The number.
        row: i64,
        /// How many rows there are.
        rows: usize,
    },
    /// A row's offsets go backwards, or point beyond the values.
    Offsets {
        /// The row.
        row: i64,
        /// Where it starts.
        start: i64,
        /// Where it ends.
        end: i64,
        /// How many values there are.
        values: usize,
    },
    /// A piece that lies outside its row.
    Piece {
        /// The row.
        row: i64,
        /// Where the piece starts.
        start: i64,
        /// Where it ends.
        end: i64,
        /// The row's length.
        length: usize,
    },
    /// A token id that the model does not know.
    Token {
        /// The row that holds it.
        row: i64,
        /// Where in the row.
        position: usize,
        /// The id.
        token: i64,
        /// How many ids there are.
        vocabulary: i64,
    },
    /// A pattern whose masks are not planned.
    Pattern(u64),
    /// No such instruction set, or not on this processor.
    Simd(String),
    /// The caller asked to stop.
    Interrupted,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Range { name, value, most } => {
                write!(f, "{name} must lie in 0..={most} (got {value}); stay within its limits")
            }
            Error::Negative { name, value } => {
                write!(f, "{name} must be at least 0 (got {value}); count from 0")
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
            Error::Room { numbers } => {
                write!(f, "there is not so much memory (got {numbers} numbers to hold); work on fewer at once")
            }
            Error::Empty => write!(
                f,
                "an epoch, a window and a batch have at least one sample (got 0); check that the data set was read"
            ),
            Error::Budget { sample, length, budget } => write!(
                f,
                "a sample is longer than the token budget (got {length} tokens of sample {sample} for {budget}); raise \
                 token_budget, or shorten the sample"
            ),
            Error::Capacity(capacity) => {
                write!(f, "capacity must lie in 1..=2^24 tokens (got {capacity}); use the model's context length")
            }
            Error::Pieces(pieces) => {
                write!(f, "at most 2^28 pieces are packed at once (got {pieces}); pack the data set in parts")
            }
            Error::NegativeLength { document, length } => {
                write!(f, "document {document} has a negative length (got {length}); rebuild the offsets")
            }
            Error::TooLong { document, length, capacity } => write!(
                f,
                "document {document} does not fit into a row of {capacity} tokens (got {length}); raise the capacity, or \
                 ask for too_long=\"truncate\" or \"split\""
            ),
            Error::Row { row, rows } => {
                write!(
                    f,
                    "there is no such row (got {row}, the store has {rows}); pass 0..{rows}, or -1 for a padding row"
                )
            }
            Error::Piece { row, start, end, length } => write!(
                f,
                "a piece lies outside its row (got tokens {start}..{end} of row {row}, which has {length}); pack this \
                 store's own lengths"
            ),
            Error::Offsets { row, start, end, values } => write!(
                f,
                "the offsets of row {row} go backwards or beyond the values (got {start}..{end} of {values}); rebuild the \
                 store"
            ),
            Error::Token { row, position, token, vocabulary } => write!(
                f,
                "row {row} holds a token id outside the vocabulary (got {token} at position {position}, not in \
                 0..{vocabulary}); tokenise with the model's own tokenizer"
            ),
            Error::Pattern(code) => write!(
                f,
                "columns (1) and spans (2) alone are planned (got pattern {code}); draw other masks where they are used"
            ),
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

/// An empty vector with room for exactly `numbers`: where input says how many, an error and not the end of the process.
pub(crate) fn room<T>(numbers: usize) -> Result<Vec<T>> {
    let mut vector = Vec::new();
    vector.try_reserve_exact(numbers).map_err(|_| Error::Room { numbers })?;
    Ok(vector)
}

/// `numbers` times `value`, or an error like [`room`]'s.
pub(crate) fn filled<T: Clone>(numbers: usize, value: T) -> Result<Vec<T>> {
    let mut vector = room(numbers)?;
    vector.resize(numbers, value);
    Ok(vector)
}

/// `value` if it is at most `most`.
pub(crate) fn at_most(name: &'static str, value: u64, most: u64) -> Result<u64> {
    if value <= most { Ok(value) } else { Err(Error::Range { name, value, most }) }
}

/// `value` if it is 0 or more.
pub(crate) fn not_negative(name: &'static str, value: i64) -> Result<u64> {
    u64::try_from(value).map_err(|_| Error::Negative { name, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_value_and_the_way_out() {
        let range = Error::Range { name: "layer", value: 1024, most: 1023 };
        assert_eq!(range.to_string(), "layer must lie in 0..=1023 (got 1024); stay within its limits");
        assert!(Error::Rate(f64::NAN).to_string().contains("got NaN"));
        assert!(Error::Scale(-1.0).to_string().contains("got -1"));
        assert!(Error::Lengths { lengths: 1, samples: 2 }.to_string().contains("1 lengths for 2 samples"));
        let words = Error::Words { words: 1, columns: 33, given: 33 };
        assert!(words.to_string().contains("got 1 words of 33 columns a row for 33 places"));
        assert!(Error::Memory { given: 7, wanted: 8 }.to_string().contains("got room for 7 places, not 8"));
        assert!(Error::Room { numbers: 9 }.to_string().contains("not so much memory (got 9 numbers"));
        assert!(Error::Empty.to_string().contains("at least one sample (got 0)"));
        let budget = Error::Budget { sample: 7, length: 90, budget: 64 };
        assert!(budget.to_string().contains("got 90 tokens of sample 7 for 64"));
        assert!(Error::Capacity(0).to_string().contains("got 0"));
        assert!(Error::Pieces(1 << 32).to_string().contains("got 4294967296"));
        let negative = Error::NegativeLength { document: 3, length: -1 };
        assert!(negative.to_string().contains("document 3 has a negative length (got -1)"));
        let long = Error::TooLong { document: 3, length: 9, capacity: 8 };
        assert!(long.to_string().contains("document 3 does not fit into a row of 8 tokens (got 9)"));
        assert!(Error::Row { row: 5, rows: 5 }.to_string().contains("got 5, the store has 5"));
        let offsets = Error::Offsets { row: 2, start: 9, end: 4, values: 12 };
        assert!(offsets.to_string().contains("row 2 go backwards or beyond the values (got 9..4 of 12)"));
        let token = Error::Token { row: 2, position: 1, token: -4, vocabulary: 10 };
        assert!(token.to_string().contains("row 2 holds a token id outside the vocabulary (got -4 at position 1"));
        assert!(Error::Pattern(0).to_string().contains("got pattern 0"));
        assert!(Error::Simd("sse9".into()).to_string().contains("got \"sse9\""));
        assert!(Error::Interrupted.to_string().contains("interrupted"));
    }

    #[test]
    fn too_much_is_an_error() {
        assert_eq!(room::<u64>(usize::MAX / 16), Err(Error::Room { numbers: usize::MAX / 16 }));
        assert_eq!(filled(usize::MAX / 2, 1u64), Err(Error::Room { numbers: usize::MAX / 2 }));
        assert_eq!(filled(2, 7u64), Ok(vec![7, 7]));
    }

    #[test]
    fn at_most_includes_the_bound() {
        assert_eq!(at_most("x", 3, 3), Ok(3));
        assert_eq!(at_most("x", 4, 3), Err(Error::Range { name: "x", value: 4, most: 3 }));
        assert_eq!(not_negative("x", 4), Ok(4));
        assert_eq!(not_negative("x", -2), Err(Error::Negative { name: "x", value: -2 }));
    }
}
