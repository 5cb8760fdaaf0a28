//! Kept rows of keys and values gathered into shorter ones, and their gradients laid back.

use crate::error::{Error, Result, at_most, room};
use crate::rng::stream::MAX_HEADS;
use crate::threads::Run;

/// The extents of keys or values, and which axis lies inside which in memory.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Examples.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Rows of a head.
    pub length: usize,
    /// Numbers of a row, contiguous.
    pub features: usize,
    /// (batch, length, heads, features), as a projection leaves them, and not (batch, heads, length, features).
    pub heads_inside: bool,
}

impl Layout {
    fn example(&self) -> usize {
        self.heads * self.length * self.features
    }

    /// Where a row begins within its example.
    fn row(&self, head: usize, row: usize) -> usize {
        let index = if self.heads_inside { row * self.heads + head } else { head * self.length + row };
        index * self.features
    }
}

/// Which rows stay, and how many places there are for them.
#[derive(Debug, Clone, Copy)]
pub struct Kept<'a> {
    /// (batch, heads, length), 1 = keep.
    pub keep: &'a [u8],
    /// Places for one head of each example, (batch,): at least what any of its heads keeps.
    pub places: &'a [u32],
}

impl Kept<'_> {
    /// Check everything against everything; returns how many numbers of `short` each example has.
    fn sizes(&self, layout: Layout, long: usize, short: usize) -> Result<Vec<usize>> {
        let memory = |given: usize, wanted: u128| {
            if given as u128 == wanted { Ok(()) } else { Err(Error::Memory { given, wanted }) }
        };
        at_most("heads", layout.heads as u64, MAX_HEADS)?;
        let product = |extents: &[usize]| extents.iter().fold(1u128, |all, &n| all.saturating_mul(n as u128));
        memory(long, product(&[layout.batch, layout.heads, layout.length, layout.features]))?;
        memory(self.keep.len(), product(&[layout.batch, layout.heads, layout.length]))?;
        if self.places.len() != layout.batch {
            return Err(Error::Lengths { lengths: self.places.len(), samples: layout.batch });
        }
        let wanted = |&n: &u32| product(&[layout.heads, n as usize, layout.features]);
        memory(short, self.places.iter().map(wanted).fold(0, u128::saturating_add))?;
        for (head, keep) in self.keep.chunks_exact(layout.length.max(1)).enumerate() {
            let count = keep.iter().filter(|&&bit| bit != 0).count() as u64;
            at_most("kept rows", count, u64::from(self.places[head / layout.heads]))?;
        }
        Ok(self.places.iter().map(|&n| n as usize * layout.heads * layout.features).collect())
    }

    /// The kept rows of one head of one example, in order.
    fn rows(&self, layout: Layout, example: usize, head: usize) -> impl Iterator<Item = usize> {
        let start = (example * layout.heads + head) * layout.length;
        let keep = &self.keep[start..start + layout.length];
        keep.iter().enumerate().filter(|&(_, &bit)| bit != 0).map(|(row, _)| row)
    }
}

/// `short` = each head's kept rows of `long`, one behind the other, (heads, places, features) an example; spare places
/// become zero.
pub fn gather<T: Copy + Default + Send + Sync>(
    run: &Run<'_>,
    layout: Layout,
    kept: Kept<'_>,
    long: &[T],
    short: &mut [T],
) -> Result<()> {
    let sizes = kept.sizes(layout, long.len(), short.len())?;
    let mut rest = short;
    let mut tasks = room(layout.batch * layout.heads)?;
    for (example, size) in sizes.into_iter().enumerate() {
        for head in 0..layout.heads {
            let (mine, others) = std::mem::take(&mut rest).split_at_mut(size / layout.heads);
            tasks.push((example, head, mine));
            rest = others;
        }
    }
    let (features, count) = (layout.features, tasks.len());
    run.worth(size_of_val(long)).for_each(tasks.into_iter(), count, |(example, head, short)| {
        let long = &long[example * layout.example()..][..layout.example()];
        let mut places = short.chunks_exact_mut(features.max(1));
        for (row, place) in kept.rows(layout, example, head).zip(&mut places) {
            place.copy_from_slice(&long[layout.row(head, row)..][..features]);
        }
        places.for_each(|place| place.fill(T::default()));
    })
}

/// The way back: `long` = `short`'s rows at the places they came from, zero elsewhere.
pub fn scatter<T: Copy + Default + Send + Sync>(
    run: &Run<'_>,
    layout: Layout,
    kept: Kept<'_>,
    short: &[T],
    long: &mut [T],
) -> Result<()> {
    let sizes = kept.sizes(layout, long.len(), short.len())?;
    if long.is_empty() {
        return Ok(());
    }
    let starts: Vec<usize> = sizes.iter().scan(0, |at, &size| Some(std::mem::replace(at, *at + size))).collect();
    let features = layout.features;
    // A head is a task where its rows lie together, else all heads of an example are one.
    let together = if layout.heads_inside { layout.heads } else { 1 };
    let tasks = long.len() / (together * layout.length * features);
    let run = run.worth(size_of_val(long));
    run.for_each(long.chunks_mut(together * layout.length * features).enumerate(), tasks, |(index, long)| {
        let (example, first) = (index * together / layout.heads, index * together % layout.heads);
        let size = sizes[example] / layout.heads;
        long.fill(T::default());
        for head in first..first + together {
            let short = &short[starts[example] + head * size..][..size];
            for (row, place) in kept.rows(layout, example, head).zip(short.chunks_exact(features)) {
                long[layout.row(head - first, row)..][..features].copy_from_slice(place);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn there_and_back(
            batch in 0usize..3, heads in 1usize..4, length in 0usize..9, features in 1usize..4,
            heads_inside: bool, bits in proptest::collection::vec(0u8..2, 0..120), spare in 0u32..3
        ) {
            let run = Run::new().unwrap();
            let layout = Layout { batch, heads, length, features, heads_inside };
            let keep: Vec<u8> =
                (0..batch * heads * length).map(|i| bits.get(i).copied().unwrap_or(1)).collect();
            let count = |head: &[u8]| head.iter().map(|&bit| u32::from(bit)).sum::<u32>();
            let most = |example: usize| (0..heads).map(|head| {
                count(&keep[(example * heads + head) * length..][..length])
            }).max().unwrap_or(0);
            let places: Vec<u32> = (0..batch).map(|example| most(example) + spare).collect();
            let kept = Kept { keep: &keep, places: &places };
            let long: Vec<u16> = (1..=(batch * layout.example()) as u16).collect();
            let total: usize = places.iter().map(|&n| n as usize * heads * features).sum();
            let mut short = vec![9; total];
            gather(&run, layout, kept, &long, &mut short).unwrap();
            let mut back = vec![9; long.len()];
            scatter(&run, layout, kept, &short, &mut back).unwrap();
            let mut start = 0;
            for example in 0..batch {
                for head in 0..heads {
                    let mut place = start + head * places[example] as usize * features;
                    for row in 0..length {
                        let at = example * layout.example() + layout.row(head, row);
                        let stays = keep[(example * heads + head) * length + row] == 1;
                        for f in 0..features {
                            prop_assert_eq!(back[at + f], if stays { long[at + f] } else { 0 });
                            if stays {
                                prop_assert_eq!(short[place + f], long[at + f]);
                            }
                        }
                        place += if stays { features } else { 0 };
                    }
                }
                start += places[example] as usize * heads * features;
            }
            prop_assert_eq!(short.iter().filter(|&&v| v != 0).count(), back.iter().filter(|&&v| v != 0).count());
        }
    }

    #[test]
    fn bad_input_is_refused() {
        let run = Run::new().unwrap();
        let layout = Layout { batch: 1, heads: 1, length: 2, features: 1, heads_inside: false };
        let attempt = |keep: &[u8], places: &[u32], long: usize, short: usize| {
            gather(&run, layout, Kept { keep, places }, &vec![1.0f32; long], &mut vec![0.0; short])
                .unwrap_err()
                .to_string()
        };
        assert!(attempt(&[1, 1], &[1], 2, 1).starts_with("kept rows must lie in 0..=1 (got 2)"));
        assert!(attempt(&[1, 0], &[1], 3, 1).contains("got room for 3"));
        assert!(attempt(&[1], &[1], 2, 1).contains("got room for 1"));
        assert!(attempt(&[1, 0], &[1, 1], 2, 1).contains("2 lengths for 1 samples"));
        assert!(attempt(&[1, 0], &[1], 2, 2).contains("got room for 2"));
        // No memory at all, and a task a head.
        let layout = Layout { heads: 1 << 40, length: 0, ..layout };
        let refused = gather::<f32>(&run, layout, Kept { keep: &[], places: &[0] }, &[], &mut []).unwrap_err();
        assert_eq!(refused, Error::Range { name: "heads", value: 1 << 40, most: 1 << 10 });
    }
}
