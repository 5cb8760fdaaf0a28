//! First fit, many documents of one length at a time, into runs of equal rows.

use crate::error::{Error, Result};
use crate::threads::Run;

/// Equal rows that stand one behind the other.
#[derive(Debug, Clone, Copy)]
struct Rows {
    space: usize,
    count: usize,
    /// What was placed last in each of them: an index into [`Placed::layers`].
    top: usize,
}

/// Documents of one length in a row, and what lies below them.
#[derive(Debug, Clone, Copy)]
struct Layer {
    length: usize,
    copies: usize,
    below: usize,
}

const NOTHING: usize = usize::MAX;
/// Runs of rows in a block: few enough to go through, many enough to have few blocks. (Tests cut blocks in two all the time.)
const BLOCK: usize = if cfg!(test) { 3 } else { 512 };

/// How many lengths are placed before the caller is asked whether to stop: milliseconds, unless all rows differ.
const WATCH: usize = 256;

/// All rows in order, in blocks that know the most space that one of their rows has.
#[derive(Debug, Default)]
pub struct Placed {
    most: Vec<usize>,
    blocks: Vec<Vec<Rows>>,
    layers: Vec<Layer>,
}

impl Placed {
    /// Place `histogram[length]` documents of each length, the longest first.
    pub fn first_fit(run: &Run<'_>, histogram: &[u64], capacity: usize) -> Result<Self> {
        let mut placed = Placed::default();
        let lengths = histogram.iter().enumerate().skip(1).rev().filter(|&(_, &count)| count > 0);
        for (number, (length, &count)) in lengths.enumerate() {
            if number % WATCH == 0 && (run.interrupted)() {
                return Err(Error::Interrupted);
            }
            let left = placed.fit(length, count as usize);
            placed.append(length, left, capacity);
        }
        Ok(placed)
    }

    /// How many rows there are.
    pub fn count(&self) -> usize {
        self.blocks.iter().flatten().map(|rows| rows.count).sum()
    }

    /// Runs of equal rows, in order: how many rows, and how many documents of which length each holds, the longest first.
    pub fn runs(&self) -> impl Iterator<Item = (usize, Vec<(usize, usize)>)> {
        self.blocks.iter().flatten().map(|rows| {
            let top = self.layers.get(rows.top);
            let mut held: Vec<_> = std::iter::successors(top, |layer| self.layers.get(layer.below))
                .map(|layer| (layer.length, layer.copies))
                .collect();
            held.reverse();
            (rows.count, held)
        })
    }

    /// Place up to `left` documents in rows that have room, and return how many remain.
    fn fit(&mut self, length: usize, mut left: usize) -> usize {
        let mut number = 0;
        while left > 0 {
            let Some(next) = self.most[number..].iter().position(|&most| most >= length) else { break };
            number += next;
            let old = std::mem::take(&mut self.blocks[number]);
            let mut block = Vec::with_capacity(old.len() + 2);
            for rows in old {
                left -= self.fill(rows, length, left, &mut block);
            }
            number += self.put_back(number, block);
        }
        left
    }

    /// Place up to `left` documents into a run of rows, each of which takes as many as it can before the next one does;
    /// the run falls into at most three. Returns how many were placed.
    fn fill(&mut self, rows: Rows, length: usize, left: usize, block: &mut Vec<Rows>) -> usize {
        let copies = rows.space / length;
        if copies == 0 || left == 0 {
            block.push(rows);
            return 0;
        }
        let full = rows.count.min(left / copies);
        let rest = if full < rows.count { left % copies } else { 0 };
        let mut untouched = rows.count - full;
        for (count, copies) in [(full, copies), (1, rest)] {
            if count * copies > 0 {
                let top = self.layer(length, copies, rows.top);
                block.push(Rows { space: rows.space - copies * length, count, top });
            }
        }
        untouched -= usize::from(rest > 0);
        if untouched > 0 {
            block.push(Rows { count: untouched, ..rows });
        }
        full * copies + rest
    }

    /// New rows for `left` documents.
    fn append(&mut self, length: usize, left: usize, capacity: usize) {
        let mut block = Vec::new();
        let count = left.div_ceil((capacity / length).max(1));
        if count > 0 {
            self.fill(Rows { space: capacity, count, top: NOTHING }, length, left, &mut block);
            match self.blocks.last_mut().filter(|last| last.len() < BLOCK) {
                Some(last) => {
                    last.append(&mut block);
                    let end = self.most.len() - 1;
                    self.most[end] = most(&self.blocks[end]);
                }
                None => {
                    self.most.push(most(&block));
                    self.blocks.push(block);
                }
            }
        }
    }

    /// Put block `number` back, in two if it has grown too large. Returns how many there are of it now.
    fn put_back(&mut self, number: usize, mut block: Vec<Rows>) -> usize {
        let second = (block.len() > 2 * BLOCK).then(|| block.split_off(BLOCK));
        self.most[number] = most(&block);
        self.blocks[number] = block;
        let Some(second) = second else { return 1 };
        self.most.insert(number + 1, most(&second));
        self.blocks.insert(number + 1, second);
        2
    }

    fn layer(&mut self, length: usize, copies: usize, below: usize) -> usize {
        self.layers.push(Layer { length, copies, below });
        self.layers.len() - 1
    }
}

fn most(block: &[Rows]) -> usize {
    block.iter().map(|rows| rows.space).max().unwrap_or(0)
}
