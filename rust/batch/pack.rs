//! Documents into rows of a fixed capacity: first fit decreasing over a histogram of lengths.
//!
//! Longest first, equal lengths by number, each document goes into the first row that still has room. Documents of one
//! length are alike, and so are rows that hold the same lengths: what is placed are numbers of documents into runs of
//! equal rows, so that the work hardly depends on how many documents there are. Numbers are dealt out at the end.

use super::place::Placed;
use crate::error::{Error, Result, filled, room};
use crate::threads::Run;

/// The largest capacity: the histogram has one place a length.
pub const MAX_CAPACITY: u64 = 1 << 24;

/// The most pieces: one costs 36 bytes, so that a length that is wrong must not ask for more than a machine has.
pub const MAX_PIECES: u64 = 1 << 28;

/// What becomes of a document that is longer than a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TooLong {
    /// An error that names the first one.
    Refuse,
    /// Only its first `capacity` tokens are used.
    Truncate,
    /// It is cut into pieces of `capacity` tokens, the last one shorter.
    Split,
}

/// A length as it is stored.
pub trait Length: Copy {
    /// As a 64-bit number.
    fn wide(self) -> i64;
}

impl Length for i32 {
    #[inline(always)]
    fn wide(self) -> i64 {
        i64::from(self)
    }
}

impl Length for i64 {
    #[inline(always)]
    fn wide(self) -> i64 {
        self
    }
}

/// Which documents share a row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Packing {
    /// Row r holds the pieces `offsets[r]..offsets[r + 1]`.
    pub offsets: Vec<i64>,
    /// The document that each piece is of. Empty documents are in no row.
    pub documents: Vec<i64>,
    /// [`TooLong::Split`]: where in its document each piece starts. Else empty.
    pub starts: Vec<i64>,
    /// [`TooLong::Split`]: each piece's length. Else empty.
    pub lengths: Vec<i64>,
    /// Tokens in all rows.
    pub tokens: u64,
}

/// Pack documents of these `lengths` into rows of `capacity` tokens.
pub fn pack<L: Length>(run: &Run<'_>, lengths: &[L], capacity: u64, too_long: TooLong) -> Result<Packing> {
    if capacity == 0 || capacity > MAX_CAPACITY {
        return Err(Error::Capacity(capacity));
    }
    let histogram = histogram(run, lengths, capacity, too_long)?;
    let pieces = histogram.iter().fold(0, |sum: u64, &count| sum.saturating_add(count)).max(lengths.len() as u64);
    if pieces > MAX_PIECES {
        return Err(Error::Pieces(pieces));
    }
    let placed = Placed::first_fit(run, &histogram, capacity as usize)?;
    stop(run)?;
    let (sorted, begins) = sort(run, lengths, &histogram, capacity, too_long)?;
    stop(run)?;
    let mut packing = deal(run, &placed, &sorted, begins, too_long == TooLong::Split)?;
    packing.tokens = (0..).zip(&histogram).map(|(length, count)| length * count).sum();
    packing.starts = starts(run, lengths, &packing, capacity as i64)?;
    Ok(packing)
}

fn stop(run: &Run<'_>) -> Result<()> {
    if (run.interrupted)() { Err(Error::Interrupted) } else { Ok(()) }
}

/// Pieces between two questions whether to go on: some milliseconds of work.
const WATCH: usize = 1 << 21;

/// Of a document's length: how many pieces fill a row, and the length of the piece beside them (0 = there is none).
#[inline(always)]
fn pieces(length: u64, capacity: u64, too_long: TooLong) -> (u64, u64) {
    match too_long {
        _ if length <= capacity => (0, length),
        TooLong::Split => (length / capacity, length % capacity),
        TooLong::Truncate | TooLong::Refuse => (1, 0),
    }
}

/// How many pieces there are of each length; empty ones are not counted.
fn histogram<L: Length>(run: &Run<'_>, lengths: &[L], capacity: u64, too_long: TooLong) -> Result<Vec<u64>> {
    let longest = lengths.iter().map(|length| length.wide()).max().unwrap_or(0).max(0) as u64;
    let mut counts = filled(capacity.min(longest) as usize + 1, 0u64)?;
    let mut refused = None;
    for (document, length) in lengths.iter().enumerate() {
        if document % WATCH == WATCH - 1 {
            stop(run)?;
        }
        let Ok(length) = u64::try_from(length.wide()) else {
            return Err(Error::NegativeLength { document, length: length.wide() });
        };
        let (whole, rest) = pieces(length, capacity, too_long);
        counts[rest as usize] += 1;
        if whole > 0 {
            counts[capacity as usize] = counts[capacity as usize].saturating_add(whole);
            refused = refused.or(Some((document, length)));
        }
    }
    counts[0] = 0;
    match refused.filter(|_| too_long == TooLong::Refuse) {
        Some((document, length)) => Err(Error::TooLong { document, length, capacity }),
        None => Ok(counts),
    }
}

/// Documents by length, one length behind the other, each in the order of their numbers; and where each length begins.
/// Of a document that is split, one entry a piece.
fn sort<L: Length>(
    run: &Run<'_>,
    lengths: &[L],
    histogram: &[u64],
    capacity: u64,
    too_long: TooLong,
) -> Result<(Vec<u32>, Vec<usize>)> {
    let mut end = 0;
    let mut begins = room(histogram.len())?;
    for &count in histogram {
        begins.push(end);
        end += count as usize;
    }
    let mut next = begins.clone();
    let mut sorted = filled(end, 0)?;
    let mut put = |document: usize, length: u64| {
        let place = &mut next[length as usize];
        sorted[*place] = document as u32;
        *place += 1;
    };
    for (document, length) in lengths.iter().enumerate() {
        let (whole, rest) = pieces(length.wide() as u64, capacity, too_long);
        for piece in 0..whole {
            // One document may be hundreds of millions of pieces.
            if piece as usize % WATCH == WATCH - 1 {
                stop(run)?;
            }
            put(document, capacity);
        }
        if rest > 0 {
            put(document, rest);
        }
        if document % WATCH == WATCH - 1 {
            stop(run)?;
        }
    }
    Ok((sorted, begins))
}

/// Give every place its document: of each length, the next one. `next`: where each length begins in `sorted`.
fn deal(run: &Run<'_>, placed: &Placed, sorted: &[u32], mut next: Vec<usize>, with_lengths: bool) -> Result<Packing> {
    let mut packing = Packing {
        offsets: room(placed.count() + 1)?,
        documents: room(sorted.len())?,
        lengths: room(if with_lengths { sorted.len() } else { 0 })?,
        ..Packing::default()
    };
    packing.offsets.push(0);
    for (rows, held) in placed.runs() {
        for _ in 0..rows {
            if packing.offsets.len().is_multiple_of(WATCH) {
                stop(run)?;
            }
            for &(length, copies) in &held {
                let begin = next[length];
                next[length] += copies;
                packing.documents.extend(sorted[begin..begin + copies].iter().map(|&document| i64::from(document)));
                if with_lengths {
                    packing.lengths.extend(std::iter::repeat_n(length as i64, copies));
                }
            }
            packing.offsets.push(packing.documents.len() as i64);
        }
    }
    Ok(packing)
}

/// Where each piece starts: the last one of a document ends with it, and those of a whole row stand in order.
fn starts<L: Length>(run: &Run<'_>, lengths: &[L], packing: &Packing, capacity: i64) -> Result<Vec<i64>> {
    let mut before = (0, -1);
    let mut start = |(&length, &document): (&i64, &i64)| {
        if length < capacity {
            return lengths[document as usize].wide() - length;
        }
        before = if before.1 == document { (before.0 + capacity, document) } else { (0, document) };
        before.0
    };
    let mut found = room(packing.lengths.len())?;
    for (lengths, documents) in packing.lengths.chunks(WATCH).zip(packing.documents.chunks(WATCH)) {
        found.extend(lengths.iter().zip(documents).map(&mut start));
        stop(run)?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, a document at a time: (row, document, length) in order.
    fn first_fit(lengths: &[i64], capacity: i64) -> Vec<Vec<i64>> {
        let mut order: Vec<usize> = (0..lengths.len()).filter(|&i| lengths[i] > 0).collect();
        order.sort_by_key(|&document| -lengths[document]);
        let mut rows: Vec<(i64, Vec<i64>)> = vec![];
        for document in order {
            let length = lengths[document].min(capacity);
            match rows.iter_mut().find(|(space, _)| *space >= length) {
                Some((space, row)) => {
                    *space -= length;
                    row.push(document as i64);
                }
                None => rows.push((capacity - length, vec![document as i64])),
            }
        }
        rows.into_iter().map(|(_, row)| row).collect()
    }

    fn rows(packing: &Packing) -> Vec<Vec<i64>> {
        packing.offsets.windows(2).map(|at| packing.documents[at[0] as usize..at[1] as usize].to_vec()).collect()
    }

    fn run() -> Run<'static> {
        Run::new().unwrap()
    }

    proptest! {
        #[test]
        fn it_is_first_fit_decreasing(
            capacity in 1..90i64, lengths in prop::collection::vec(0..90i64, 0..300), narrow: bool
        ) {
            let lengths: Vec<i64> = lengths.into_iter().map(|length| length % (capacity + 1)).collect();
            let packing = if narrow {
                let lengths: Vec<i32> = lengths.iter().map(|&length| length as i32).collect();
                pack(&run(), &lengths, capacity as u64, TooLong::Refuse).unwrap()
            } else {
                pack(&run(), &lengths, capacity as u64, TooLong::Refuse).unwrap()
            };
            prop_assert_eq!(rows(&packing), first_fit(&lengths, capacity));
            prop_assert_eq!(packing.tokens as i64, lengths.iter().sum::<i64>());
            prop_assert!(packing.starts.is_empty() && packing.lengths.is_empty());
        }

        #[test]
        fn a_split_document_is_there_once(capacity in 1..20u64, lengths in prop::collection::vec(0..90i64, 0..60)) {
            let packing = pack(&run(), &lengths, capacity, TooLong::Split).unwrap();
            let mut seen: Vec<Vec<u8>> = lengths.iter().map(|&length| vec![0; length as usize]).collect();
            for at in packing.offsets.windows(2) {
                let row = at[0] as usize..at[1] as usize;
                prop_assert!(packing.lengths[row.clone()].iter().sum::<i64>() as u64 <= capacity);
                prop_assert!(!row.is_empty());
            }
            for i in 0..packing.documents.len() {
                let (start, length) = (packing.starts[i] as usize, packing.lengths[i] as usize);
                prop_assert!((start as u64).is_multiple_of(capacity) && length > 0);
                seen[packing.documents[i] as usize][start..start + length].iter_mut().for_each(|count| *count += 1);
            }
            prop_assert!(seen.iter().flatten().all(|&count| count == 1));
        }
    }

    /// Thousands of lengths: the caller is asked now and then whether to go on.
    #[test]
    fn many_runs() {
        let lengths: Vec<i64> = (0..30_000u64).map(|i| (i * 2_654_435_761 % 9_973) as i64).collect();
        let asked = std::cell::Cell::new(0);
        let ask = || {
            asked.set(asked.get() + 1);
            false
        };
        let packing = pack(&Run { interrupted: &ask, ..run() }, &lengths, 10_000, TooLong::Refuse).unwrap();
        assert_eq!(rows(&packing), first_fit(&lengths, 10_000));
        assert!(asked.get() > 30);
    }

    /// One document of millions of pieces: the caller is asked at each stage.
    #[test]
    fn many_pieces() {
        let asked = std::cell::Cell::new(0);
        let ask = || {
            asked.set(asked.get() + 1);
            false
        };
        let packing = pack(&Run { interrupted: &ask, ..run() }, &[5 << 20i64], 1, TooLong::Split).unwrap();
        assert_eq!((packing.starts.len(), packing.starts.last()), (5 << 20, Some(&((5 << 20) - 1))));
        assert!(asked.get() >= 9, "sorting and dealing ask twice, the starts three times");
    }

    #[test]
    fn what_is_too_long() {
        let packed = |too_long| pack(&run(), &[3i64, 11, 25], 10, too_long);
        assert_eq!(packed(TooLong::Refuse), Err(Error::TooLong { document: 1, length: 11, capacity: 10 }));
        let truncated = packed(TooLong::Truncate).unwrap();
        assert_eq!((rows(&truncated), truncated.tokens), (vec![vec![1], vec![2], vec![0]], 23));
        let split = packed(TooLong::Split).unwrap();
        assert_eq!(rows(&split), [vec![1], vec![2], vec![2], vec![2, 0, 1]]);
        assert_eq!(split.starts, [0, 0, 10, 20, 0, 10]);
        assert_eq!(split.lengths, [10, 10, 10, 5, 3, 1]);
    }

    #[test]
    fn what_is_refused() {
        let one = |lengths: &[i64], capacity| pack(&run(), lengths, capacity, TooLong::Split).unwrap_err();
        assert_eq!(one(&[1], 0), Error::Capacity(0));
        assert_eq!(one(&[1], MAX_CAPACITY + 1), Error::Capacity(MAX_CAPACITY + 1));
        assert_eq!(one(&[1, -3], 8), Error::NegativeLength { document: 1, length: -3 });
        assert_eq!(one(&[i64::MAX, i64::MAX, 1 << 40], 1), Error::Pieces(u64::MAX));
        assert_eq!(one(&[1, 1 << 32], 1), Error::Pieces((1 << 32) + 1));
        let stopped = Run { interrupted: &|| true, ..run() };
        assert_eq!(pack(&stopped, &[1i32], 8, TooLong::Refuse), Err(Error::Interrupted));
        assert_eq!(pack(&run(), &[] as &[i64], 8, TooLong::Refuse).unwrap().offsets, [0]);
        assert_eq!(pack(&run(), &[0i64, 0], 8, TooLong::Refuse).unwrap().offsets, [0]);
    }
}
