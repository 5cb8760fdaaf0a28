//! Which samples make a step: windows of the epoch's order, sorted by length and cut into global batches.
//!
//! Nothing here knows ranks or micro-batches: [`super::share`] does.

use super::order::{Order, SAMPLES};
use super::share::{cost, even_cut, greedy_cut};
use crate::error::{Error, Result, at_most, filled, room};
use crate::threads::Run;
use std::cmp::Reverse;
use std::sync::OnceLock;

/// Most samples of a window; one costs 40 bytes a sample while it is made.
pub const MAX_WINDOW: u64 = 1 << 26;

/// Where a window is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Into batches of so many samples; the epoch's last one holds what is left.
    Rows(u64),
    /// Into batches of at most so many tokens, padding to the batch's longest sample included.
    Tokens(u64),
}

/// An epoch's batches, before anything of it was drawn.
#[derive(Debug, Clone, Copy)]
pub struct Epoch<'a> {
    /// The user's seed.
    pub seed: u64,
    /// The epoch, below 2^32.
    pub epoch: u64,
    /// Whether order and batches are drawn; else both stay as they are.
    pub shuffle: bool,
    /// Every sample's tokens.
    pub lengths: &'a [u32],
    /// How many positions of the order are used, from the first on: all, or a whole number of batches.
    pub used: u64,
    /// Samples of a window; a whole number of batches, if their size is fixed.
    pub window: u64,
    /// Where a window is cut.
    pub cut: Cut,
}

impl Epoch<'_> {
    fn check(&self) -> Result<()> {
        at_most("window", self.window, MAX_WINDOW)?;
        at_most("used positions", self.used, self.lengths.len() as u64)?;
        let (Cut::Rows(unit) | Cut::Tokens(unit)) = self.cut;
        if self.used == 0 || self.window == 0 || unit == 0 {
            return Err(Error::Empty);
        }
        match self.cut {
            Cut::Rows(rows) if !self.window.is_multiple_of(rows) => {
                Err(Error::Memory { given: self.window as usize, wanted: u128::from(rows) })
            }
            _ => Ok(()),
        }
    }

    /// How many windows the epoch has.
    fn windows(&self) -> u64 {
        self.used.div_ceil(self.window)
    }

    /// The first position of a window, and the one behind its last.
    fn positions(&self, number: u64) -> (u64, u64) {
        let start = number * self.window;
        (start, (start + self.window).min(self.used))
    }

    fn order(&self) -> Result<Option<Order>> {
        let size = self.lengths.len() as u64;
        if self.shuffle { Order::new(self.seed, self.epoch, SAMPLES, size).map(Some) } else { Ok(None) }
    }

    /// The batches of a window, one behind the other, each by falling length; `ends` says where each ends.
    ///
    /// `samples` has room for the whole window, and so has `ends`. Returns the number of batches.
    pub fn window(&self, run: &Run<'_>, number: u64, samples: &mut [i64], ends: &mut [i64]) -> Result<usize> {
        self.check()?;
        at_most("window", number, self.windows() - 1)?;
        let (start, stop) = self.positions(number);
        for given in [samples.len(), ends.len()] {
            if given as u64 != stop - start {
                return Err(Error::Memory { given, wanted: u128::from(stop - start) });
            }
        }
        match self.order()? {
            Some(order) => order.fill(run, start, samples)?,
            None => in_place(start, samples),
        }
        let sorted = self.sorted(samples)?;
        if (run.interrupted)() {
            return Err(Error::Interrupted);
        }
        let (places, cut) = self.batches(number, &sorted)?;
        let mut written = 0;
        for (&place, end) in places.iter().zip(ends) {
            let rows = &sorted[if place == 0 { 0 } else { cut[place - 1] }..cut[place]];
            for (place, &(_, sample)) in samples[written..].iter_mut().zip(rows) {
                *place = sample;
            }
            written += rows.len();
            *end = written as i64;
        }
        Ok(cut.len())
    }

    /// (length, sample) by falling length; equal ones stay in order.
    fn sorted(&self, samples: &[i64]) -> Result<Vec<(u32, i64)>> {
        let mut rows = room(samples.len())?;
        rows.extend(samples.iter().map(|&sample| (self.lengths[sample as usize], sample)));
        let longest = rows.iter().map(|row| row.0).max().unwrap_or(0) as usize;
        if longest > rows.len() {
            // Counting would touch more memory than it saves.
            rows.sort_by_key(|row| Reverse(row.0));
            return Ok(rows);
        }
        let mut next = filled(longest + 2, 0u32)?;
        for row in &rows {
            next[longest - row.0 as usize + 1] += 1;
        }
        for at in 1..next.len() {
            next[at] += next[at - 1];
        }
        let mut sorted = filled(rows.len(), (0, 0))?;
        for row in rows {
            let place = &mut next[longest - row.0 as usize];
            sorted[*place as usize] = row;
            *place += 1;
        }
        Ok(sorted)
    }

    /// The order in which a window's batches run, and where each ends in the sorted window.
    fn batches(&self, number: u64, sorted: &[(u32, i64)]) -> Result<(Vec<usize>, Vec<usize>)> {
        let drawn = |count: usize| -> Result<Vec<usize>> {
            let order = Order::new(self.seed, self.epoch, number + 1, count as u64)?;
            let mut places = room(count)?;
            places.extend((0..count).map(|k| if self.shuffle { order.at(k as u64) as usize } else { k }));
            Ok(places)
        };
        match self.cut {
            Cut::Rows(rows) => {
                let rows = rows as usize;
                let places = drawn(sorted.len().div_ceil(rows))?;
                // The batch that runs last is the incomplete one, wherever it lies: so it has samples of any length.
                let missing = places.len() * rows - sorted.len();
                let short = places.last().copied().unwrap_or(0);
                let end = |place| (place + 1) * rows - if place >= short { missing } else { 0 };
                let cut = (0..places.len()).map(end).collect();
                Ok((places, cut))
            }
            Cut::Tokens(budget) => {
                fits(sorted[0].1 as u64, sorted[0].0, budget)?;
                let cut = even_cut(sorted.len(), budget, |row| sorted[row].0);
                Ok((drawn(cut.len())?, cut))
            }
        }
    }

    /// How many batches each window has, where that depends on lengths.
    pub fn counts(&self, run: &Run<'_>, counts: &mut [i64]) -> Result<()> {
        self.check()?;
        let (windows, given) = (self.windows(), counts.len());
        let Cut::Tokens(budget) = self.cut else { return Err(Error::Memory { given, wanted: 0 }) };
        if given as u64 != windows {
            return Err(Error::Memory { given, wanted: u128::from(windows) });
        }
        let longest = (0u64..).zip(self.lengths).max_by_key(|&(sample, &length)| (length, Reverse(sample)));
        longest.map_or(Ok(()), |(sample, &length)| fits(sample, length, budget))?;
        let order = self.order()?;
        let batches = |number| {
            let (start, stop) = self.positions(number);
            let mut samples = filled((stop - start) as usize, 0)?;
            match &order {
                Some(order) => order.fill_here(start, &mut samples),
                None => in_place(start, &mut samples),
            }
            let sorted = self.sorted(&samples)?;
            Ok(greedy_cut(sorted.len(), budget, |row| sorted[row].0).len() as i64)
        };
        let failed = OnceLock::new();
        run.for_each((0u64..).zip(counts), given, |(number, count)| match batches(number) {
            Ok(found) => *count = found,
            Err(error) => drop(failed.set(error)),
        })?;
        failed.into_inner().map_or(Ok(()), Err)
    }
}

/// Samples as they are stored.
fn in_place(start: u64, samples: &mut [i64]) {
    (start..).zip(samples).for_each(|(position, place)| *place = position as i64);
}

fn fits(sample: u64, length: u32, budget: u64) -> Result<()> {
    if cost(1, length) <= budget { Ok(()) } else { Err(Error::Budget { sample, length: u64::from(length), budget }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::digest;
    use crate::mask::vectors;

    fn batches(epoch: &Epoch<'_>, window: u64) -> Result<Vec<Vec<i64>>> {
        let (start, stop) = epoch.positions(window);
        let (mut samples, mut ends) = (vec![0; (stop - start) as usize], vec![0; (stop - start) as usize]);
        let count = epoch.window(&Run::new()?, window, &mut samples, &mut ends)?;
        let starts = [0].into_iter().chain(ends.clone());
        Ok(starts.zip(&ends[..count]).map(|(start, &end)| samples[start as usize..end as usize].to_vec()).collect())
    }

    fn lengths(size: u32) -> Vec<u32> {
        (0..size).map(|i| 1 + (7 * i * i + 3 * i) % 61 * (i % 5 + 1) / 5).collect()
    }

    #[test]
    fn known_schedules() {
        let mut seen = 0;
        for line in vectors("order.txt").iter().filter(|line| line[0] == "schedule") {
            let n: Vec<u64> = line[1..8].iter().map(|word| word.parse().unwrap()).collect();
            let lengths = lengths(n[0] as u32);
            let cut = if n[4] > 0 { Cut::Rows(n[4]) } else { Cut::Tokens(n[5]) };
            let used = if line[8] == "drop" { n[0] - n[0] % n[4] } else { n[0] };
            let (seed, epoch, shuffle, window) = (n[1], n[2], n[3] == 1, n[6]);
            let epoch = Epoch { seed, epoch, shuffle, lengths: &lengths, used, window, cut };
            let windows: Vec<_> = (0..epoch.windows()).map(|window| batches(&epoch, window).unwrap()).collect();
            assert_eq!(windows.len().to_string(), line[9]);
            let numbers = windows.iter().flatten().flat_map(|batch| [&[batch.len() as i64], &batch[..]].concat());
            assert_eq!(digest(&numbers.collect::<Vec<_>>()), line[10], "{line:?}");
            if let Cut::Tokens(_) = cut {
                let mut counts = vec![0; windows.len()];
                epoch.counts(&Run::new().unwrap(), &mut counts).unwrap();
                assert!(counts.iter().zip(&windows).all(|(&count, batches)| count as usize == batches.len()));
            }
            seen += 1;
        }
        assert!(seen >= 26, "the vector file is too short");
    }

    const EPOCH: Epoch<'_> = Epoch {
        seed: 1,
        epoch: 0,
        shuffle: true,
        lengths: &[3, 900, 2, 900, 0],
        used: 5,
        window: 4,
        cut: Cut::Tokens(900),
    };

    /// Few samples, long ones: sorted by comparing; an empty example costs a place.
    #[test]
    fn equal_lengths_stay_in_order() {
        let epoch = Epoch { shuffle: false, window: 5, cut: Cut::Tokens(1800), ..EPOCH };
        assert_eq!(batches(&epoch, 0), Ok(vec![vec![1, 3], vec![0, 2, 4]]));
        assert_eq!(epoch.sorted(&[4, 3, 2, 1, 0]).unwrap(), [(900, 3), (900, 1), (3, 0), (2, 2), (0, 4)]);
        let empty = Epoch { lengths: &[0; 5], window: 5, cut: Cut::Tokens(2), ..EPOCH };
        assert_eq!(batches(&empty, 0).unwrap().iter().map(Vec::len).max(), Some(2));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let run = Run::new().unwrap();
        let tight = Epoch { cut: Cut::Tokens(899), ..EPOCH };
        assert_eq!(tight.counts(&run, &mut [0; 2]), Err(Error::Budget { sample: 1, length: 900, budget: 899 }));
        let found: Vec<_> = (0..2).filter_map(|window| batches(&tight, window).err()).collect();
        assert!(matches!(found[0], Error::Budget { sample: 1 | 3, length: 900, budget: 899 }));
        let window = |epoch: Epoch<'_>, number, room| {
            epoch.window(&run, number, &mut vec![0; room], &mut vec![0; room]).unwrap_err()
        };
        assert_eq!(window(EPOCH, 2, 4), Error::Range { name: "window", value: 2, most: 1 });
        assert_eq!(window(EPOCH, 0, 3), Error::Memory { given: 3, wanted: 4 });
        assert_eq!(EPOCH.window(&run, 0, &mut [0; 4], &mut [0; 3]), Err(Error::Memory { given: 3, wanted: 4 }));
        assert_eq!(window(Epoch { used: 0, ..EPOCH }, 0, 0), Error::Empty);
        assert_eq!(window(Epoch { window: 0, ..EPOCH }, 0, 0), Error::Empty);
        assert_eq!(window(Epoch { cut: Cut::Rows(0), ..EPOCH }, 0, 4), Error::Empty);
        assert_eq!(window(Epoch { cut: Cut::Rows(3), ..EPOCH }, 0, 4), Error::Memory { given: 4, wanted: 3 });
        let most = MAX_WINDOW;
        let wide = Epoch { window: most + 1, ..EPOCH };
        assert_eq!(window(wide, 0, 4), Error::Range { name: "window", value: most + 1, most });
        let beyond = Epoch { used: 6, ..EPOCH };
        assert_eq!(window(beyond, 0, 4), Error::Range { name: "used positions", value: 6, most: 5 });
        assert_eq!(EPOCH.counts(&run, &mut [0; 3]), Err(Error::Memory { given: 3, wanted: 2 }));
        assert!(Epoch { cut: Cut::Rows(2), ..EPOCH }.counts(&run, &mut [0; 2]).is_err());
        let stopped = Run { interrupted: &|| true, ..run };
        assert_eq!(EPOCH.window(&stopped, 0, &mut [0; 4], &mut [0; 4]), Err(Error::Interrupted));
    }
}
