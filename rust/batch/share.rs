//! Sorted rows cut into runs that cost about the same, and dealt to ranks.
//!
//! The cost of a run is its padded size: rows times the longest, which is the first. So a cut under a cap is a chain of
//! divisions that never looks at the rows between, and the smallest cap is found by bisection.

use super::schedule::MAX_WINDOW;
use crate::error::{Error, Result, at_most};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Most parts of a batch: ranks times micro-batches.
pub const MAX_PARTS: u64 = 1 << 24;

/// Padded tokens of so many rows; an empty example takes a place, too.
pub fn cost(rows: usize, longest: u32) -> u64 {
    rows as u64 * u64::from(longest.max(1))
}

fn rows_under(cap: u64, longest: u32) -> usize {
    (cap / u64::from(longest.max(1))) as usize
}

/// Where each run ends if every one takes as many rows as `cap` allows, at least one.
pub fn greedy_cut(rows: usize, cap: u64, length: impl Fn(usize) -> u32) -> Vec<usize> {
    let mut ends = Vec::new();
    let mut at = 0;
    while at < rows {
        at += rows_under(cap, length(at)).clamp(1, rows - at);
        ends.push(at);
    }
    ends
}

/// The cut into as few runs as `budget` allows, and of those the one whose largest is smallest: otherwise the last run
/// would be whatever few rows are left.
pub fn even_cut(rows: usize, budget: u64, length: impl Fn(usize) -> u32) -> Vec<usize> {
    let fewest = greedy_cut(rows, budget, &length).len();
    let cap = smallest(cost(1, length(0)), budget, |cap| {
        let mut at = 0;
        (0..fewest).any(|_| {
            at += rows_under(cap, length(at)).clamp(1, rows - at);
            at == rows
        })
    });
    greedy_cut(rows, cap, length)
}

/// The smallest number in `low..=high` for which `fits`, which is true of `high`, and of all above one that it is true of.
fn smallest(mut low: u64, mut high: u64, fits: impl Fn(u64) -> bool) -> u64 {
    while low < high {
        let middle = low + (high - low) / 2;
        if fits(middle) { high = middle } else { low = middle + 1 }
    }
    low
}

/// Where each of `parts` runs ends, none of them empty, the largest as small as can be. There are at least so many rows.
fn cut_into(rows: usize, parts: usize, length: &impl Fn(usize) -> u32) -> Vec<usize> {
    let take = |at: usize, left: usize, cap: u64| rows_under(cap, length(at)).min(rows - at - left);
    let fits = |cap| {
        let mut at = 0;
        (0..parts).rev().all(|left| {
            let more = take(at, left, cap);
            at += more;
            more > 0
        }) && at == rows
    };
    let longest = length(0);
    let cap = smallest(cost(1, longest), cost(rows.div_ceil(parts), longest), fits);
    let mut at = 0;
    let each = (0..parts).rev().map(|left| {
        at += take(at, left, cap);
        at
    });
    each.collect()
}

/// How a batch is shared out: `ranks` times `micro` micro-batches.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    /// Ranks, at least one.
    pub ranks: usize,
    /// Micro-batches of a rank, at least one.
    pub micro: usize,
}

impl Share {
    /// (start, end) of every rank's micro-batches, one rank behind the other, in a batch sorted by falling length; (0, 0)
    /// where no row is left.
    ///
    /// Every micro-batch gets a row while there are rows. The costliest goes first, to the rank that has least.
    pub fn bounds(&self, samples: &[i64], lengths: &[u32], out: &mut [i64]) -> Result<()> {
        self.check(samples, lengths, out.len())?;
        out.fill(0);
        let length = |row: usize| lengths[samples[row] as usize];
        let parts = (self.ranks * self.micro).min(samples.len());
        if parts == 0 {
            return Ok(());
        }
        let ends = cut_into(samples.len(), parts, &length);
        let start = |part: usize| if part == 0 { 0 } else { ends[part - 1] };
        let mut costs: Vec<(Reverse<u64>, usize)> =
            (0..parts).map(|part| (Reverse(cost(ends[part] - start(part), length(start(part)))), part)).collect();
        costs.sort_unstable();
        let mut loads: BinaryHeap<_> = (0..self.ranks).map(|rank| Reverse((0, rank, 0))).collect();
        for (Reverse(cost), part) in costs {
            let Some(Reverse((load, rank, held))) = loads.pop() else { break };
            let place = 2 * (rank * self.micro + held);
            out[place] = start(part) as i64;
            out[place + 1] = ends[part] as i64;
            if held + 1 < self.micro {
                loads.push(Reverse((load + cost, rank, held + 1)));
            }
        }
        Ok(())
    }

    fn check(&self, samples: &[i64], lengths: &[u32], given: usize) -> Result<()> {
        at_most("parts", (self.ranks as u64).saturating_mul(self.micro as u64), MAX_PARTS)?;
        at_most("rows", samples.len() as u64, MAX_WINDOW)?;
        // Negative ones arrive here as huge ones.
        let worst = samples.iter().map(|&sample| sample as u64).max().filter(|&sample| sample >= lengths.len() as u64);
        if let Some(value) = worst {
            return Err(Error::Range { name: "sample", value, most: (lengths.len() as u64).saturating_sub(1) });
        }
        let wanted = 2 * self.ranks as u128 * self.micro as u128;
        if given as u128 == wanted && wanted > 0 { Ok(()) } else { Err(Error::Memory { given, wanted }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bounds(lengths: &[u32], ranks: usize, micro: usize) -> Vec<(usize, usize)> {
        let samples: Vec<i64> = (0..lengths.len() as i64).collect();
        let mut out = vec![-1; 2 * ranks * micro];
        Share { ranks, micro }.bounds(&samples, lengths, &mut out).unwrap();
        out.as_chunks().0.iter().map(|&[start, end]| (start as usize, end as usize)).collect()
    }

    /// The smallest largest cost of `parts` runs, by trying every first run.
    fn best(lengths: &[u32], parts: usize) -> u64 {
        let first = |rows| cost(rows, lengths[0]);
        if parts == 1 {
            return first(lengths.len());
        }
        let most = lengths.len() - (parts - 1);
        (1..=most).map(|rows| first(rows).max(best(&lengths[rows..], parts - 1))).min().unwrap_or(u64::MAX)
    }

    proptest! {
        #[test]
        fn rows_are_shared_out_once_and_evenly(
            mut lengths in prop::collection::vec(0..40u32, 1..14), ranks in 1..5usize, micro in 1..4usize
        ) {
            lengths.sort_unstable_by_key(|&length| Reverse(length));
            let bounds = bounds(&lengths, ranks, micro);
            let mut rows: Vec<usize> = bounds.iter().flat_map(|&(start, end)| start..end).collect();
            rows.sort_unstable();
            prop_assert!(rows.into_iter().eq(0..lengths.len()));
            let filled: Vec<_> = bounds.iter().filter(|(start, end)| start < end).collect();
            let parts = lengths.len().min(ranks * micro);
            prop_assert_eq!(filled.len(), parts);
            let heaviest = filled.iter().map(|&&(start, end)| cost(end - start, lengths[start])).max();
            prop_assert_eq!(heaviest, Some(best(&lengths, parts)));
        }

        #[test]
        fn batches_are_as_few_and_as_even_as_can_be(
            mut lengths in prop::collection::vec(0..40u32, 1..14), spare in 0..200u64
        ) {
            lengths.sort_unstable_by_key(|&length| Reverse(length));
            let budget = u64::from(lengths[0].max(1)) + spare;
            let ends = even_cut(lengths.len(), budget, |row| lengths[row]);
            let fewest = (1..=lengths.len()).find(|&parts| best(&lengths, parts) <= budget);
            prop_assert_eq!(Some(ends.len()), fewest);
            let starts = [0].into_iter().chain(ends.clone());
            let heaviest = starts.zip(&ends).map(|(start, end)| cost(end - start, lengths[start])).max();
            prop_assert_eq!(heaviest, Some(best(&lengths, ends.len())));
        }
    }

    /// Two long micro-batches never meet on a rank while another one has none.
    #[test]
    fn the_costliest_meets_the_cheapest() {
        assert_eq!(bounds(&[9, 8, 2, 1], 2, 2), [(0, 1), (3, 4), (1, 2), (2, 3)]);
        assert_eq!(bounds(&[5, 5], 3, 2), [(0, 1), (0, 0), (1, 2), (0, 0), (0, 0), (0, 0)]);
    }

    #[test]
    fn what_cannot_be_shared_is_refused() {
        let share = |ranks, micro, samples: &[i64], lengths: &[u32], room| {
            Share { ranks, micro }.bounds(samples, lengths, &mut vec![0; room])
        };
        assert_eq!(share(1, 1, &[], &[], 2), Ok(()));
        assert_eq!(share(0, 1, &[], &[], 0), Err(Error::Memory { given: 0, wanted: 0 }));
        assert_eq!(share(2, 1, &[0], &[4], 2), Err(Error::Memory { given: 2, wanted: 4 }));
        assert_eq!(share(1, 1, &[1], &[4], 2), Err(Error::Range { name: "sample", value: 1, most: 0 }));
        assert_eq!(share(1, 1, &[0], &[], 2), Err(Error::Range { name: "sample", value: 0, most: 0 }));
        assert!(share(1, 1, &[-1], &[4], 2).is_err());
        assert!(share(1 << 40, 1 << 40, &[0], &[4], 2).is_err());
    }
}
