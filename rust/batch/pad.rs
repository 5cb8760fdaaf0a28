//! Pieces of documents into padded or joined rows, straight into memory of the caller.
//!
//! Padded, each piece has a row to itself; joined, several stand in a row, one behind the other. What is made of them are
//! planes of the same (rows, width): ids, mask, labels, positions, ...

use super::rows::{PADDING, Piece, Values};
use crate::error::{Error, Result, at_most};
use crate::simd::Engine;

/// The label that no loss is computed for.
pub const IGNORED: i64 = -100;

/// What a plane holds, at tokens and at padding.
#[derive(Debug, Clone, Copy)]
pub enum Plane<'a> {
    /// A column's values.
    Column {
        /// One a token.
        values: Values<'a>,
        /// What stands for nothing.
        padding: i64,
    },
    /// Token ids, `padding` where there is none; one that is not in `0..vocabulary` is an error.
    Tokens {
        /// The ids.
        values: Values<'a>,
        /// The id of padding.
        padding: i64,
        /// How many ids there are.
        vocabulary: i64,
    },
    /// What the model is to predict, [`IGNORED`] where there is nothing.
    Labels {
        /// One a token; `None`: the token ids themselves, which are the first plane.
        values: Option<Values<'a>>,
        /// Whether rows hold several documents: no document's first token is predicted by the token before it.
        joined: bool,
    },
    /// 1 at tokens, and at the token of a padding row; 0 at padding.
    Mask,
    /// 0, 1, ... from each piece's start; padding counts on its own if it is `joined`, else it is 0.
    Positions {
        /// Whether rows hold several documents, of which padding is one more.
        joined: bool,
    },
    /// The example's id, -1 at padding. Without ids it is the row number.
    Samples(Option<&'a [i64]>),
}

impl<'a> Plane<'a> {
    fn values(&self) -> Option<Values<'a>> {
        match *self {
            Plane::Tokens { values, .. } | Plane::Column { values, .. } => Some(values),
            Plane::Labels { values, .. } => values,
            Plane::Mask | Plane::Positions { .. } | Plane::Samples(_) => None,
        }
    }

    /// Write a piece. `tokens`: what the first plane holds there.
    fn write(&self, engine: Engine, piece: &Piece, tokens: &[i64], out: &mut [i64]) -> Result<()> {
        match (*self, piece.values()) {
            (Plane::Tokens { values, vocabulary, .. }, Some(at)) => {
                if !values.copy(engine, at, vocabulary.saturating_sub(1), out) {
                    return Err(unknown(piece.row, out, vocabulary));
                }
            }
            (Plane::Column { values, .. }, Some(at)) => _ = values.copy(engine, at, i64::MAX, out),
            (Plane::Labels { values, joined }, Some(at)) => {
                match values {
                    Some(values) => _ = values.copy(engine, at, i64::MAX, out),
                    None => out.copy_from_slice(tokens),
                }
                if joined && let Some(first) = out.first_mut() {
                    *first = IGNORED;
                }
            }
            (Plane::Tokens { .. } | Plane::Column { .. } | Plane::Labels { .. }, None) => self.pad(out),
            (Plane::Mask, _) => out.fill(1),
            (Plane::Positions { .. }, _) => count(out),
            (Plane::Samples(ids), _) => out.fill(sample(ids, piece.row)?),
        }
        Ok(())
    }

    fn pad(&self, out: &mut [i64]) {
        match *self {
            Plane::Tokens { padding, .. } | Plane::Column { padding, .. } => out.fill(padding),
            Plane::Labels { .. } => out.fill(IGNORED),
            Plane::Mask | Plane::Positions { joined: false } => out.fill(0),
            Plane::Positions { joined: true } => count(out),
            Plane::Samples(_) => out.fill(PADDING),
        }
    }
}

fn unknown(row: i64, tokens: &[i64], vocabulary: i64) -> Error {
    let position = tokens.iter().position(|token| !(0..vocabulary).contains(token)).unwrap_or_default();
    Error::Token { row, position, token: tokens[position], vocabulary }
}

fn count(out: &mut [i64]) {
    (0..).zip(out).for_each(|(position, place)| *place = position);
}

fn sample(ids: Option<&[i64]>, row: i64) -> Result<i64> {
    match ids {
        Some(ids) if row != PADDING => {
            usize::try_from(row).ok().and_then(|row| ids.get(row)).copied().ok_or(Error::Row { row, rows: ids.len() })
        }
        _ => Ok(row),
    }
}

/// The ids of rows; -1 stays -1.
pub fn samples(ids: Option<&[i64]>, rows: &[i64], out: &mut [i64]) -> Result<()> {
    if out.len() != rows.len() {
        return Err(Error::Memory { given: out.len(), wanted: rows.len() as u128 });
    }
    for (&row, out) in rows.iter().zip(out) {
        *out = sample(ids, row)?;
    }
    Ok(())
}

/// Which pieces make which row, and how wide rows are.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The instruction set.
    pub engine: Engine,
    /// All pieces, one row's behind the other's.
    pub pieces: &'a [Piece],
    /// Row r holds `pieces[bounds[r]..bounds[r + 1]]`; `None`: each has a row to itself.
    pub bounds: Option<&'a [i64]>,
    /// Places a row.
    pub width: usize,
    /// Padding stands before the tokens instead of behind them.
    pub left: bool,
}

impl<'a> Rows<'a> {
    /// Each row's pieces, which were checked to fit into it.
    fn groups(&self) -> Result<Vec<&'a [Piece]>> {
        let groups: Vec<&[Piece]> = match self.bounds {
            None => self.pieces.chunks(1).collect(),
            Some(bounds) => {
                let wrong = Error::Memory { given: self.pieces.len(), wanted: bounds.last().map_or(0, |&n| n as u128) };
                let ends = (bounds.first().copied(), bounds.last().copied());
                if ends != (Some(0), Some(self.pieces.len() as i64)) {
                    return Err(wrong);
                }
                let group = |at: &[i64]| self.pieces.get(at[0] as usize..at[1] as usize);
                bounds.windows(2).map(group).collect::<Option<_>>().ok_or(wrong)?
            }
        };
        let used = |group: &&[Piece]| group.iter().map(|piece| piece.length).sum::<usize>();
        match groups.iter().map(used).find(|&used| used > self.width) {
            Some(used) => Err(Error::Memory { given: self.width, wanted: used as u128 }),
            None => Ok(groups),
        }
    }

    /// Write each plane, (rows, width), one behind the other.
    pub fn write(&self, planes: &[Plane<'_>], out: &mut [i64]) -> Result<()> {
        let groups = self.groups()?;
        let wanted = planes.len() as u128 * groups.len() as u128 * self.width as u128;
        if out.len() as u128 != wanted {
            return Err(Error::Memory { given: out.len(), wanted });
        }
        let end = self.pieces.iter().filter_map(Piece::values).map(|at| at.end).max().unwrap_or(0);
        for values in planes.iter().filter_map(Plane::values) {
            if end > values.len() {
                return Err(Error::Memory { given: values.len(), wanted: end as u128 });
            }
            values.approach(self.pieces);
        }
        if out.is_empty() {
            return Ok(());
        }
        let (first, others) = out.split_at_mut(groups.len() * self.width); // there is a plane: `out` is not empty
        for (group, row) in groups.iter().zip(first.chunks_exact_mut(self.width)) {
            self.row(&planes[0], group, &[], row)?;
        }
        let rows = planes[1..].iter().flat_map(|plane| groups.iter().map(move |group| (plane, *group)));
        let tokens = first.chunks_exact(self.width).cycle();
        for (((plane, group), tokens), row) in rows.zip(tokens).zip(others.chunks_exact_mut(self.width)) {
            self.row(plane, group, tokens, row)?;
        }
        Ok(())
    }

    fn row(&self, plane: &Plane<'_>, group: &[Piece], tokens: &[i64], row: &mut [i64]) -> Result<()> {
        let used: usize = group.iter().map(|piece| piece.length).sum();
        let mut at = if self.left { self.width - used } else { 0 };
        plane.pad(&mut row[..at]);
        for piece in group {
            let place = at..at + piece.length;
            at = place.end;
            plane.write(self.engine, piece, tokens.get(place.clone()).unwrap_or_default(), &mut row[place])?;
        }
        plane.pad(&mut row[at..]);
        Ok(())
    }

    /// Where documents begin in the flattened rows, with the end of all as the last one, and the longest one's length.
    /// The padding at a row's end is a document of its own.
    pub fn boundaries(&self) -> Result<(Vec<i32>, usize)> {
        let mut found = vec![0];
        let (mut end, mut longest) = (0, 0);
        let groups = self.groups()?;
        at_most("length", (groups.len() as u64).saturating_mul(self.width as u64), i32::MAX as u64)?;
        for (row, group) in groups.iter().enumerate() {
            let rest = (row + 1) * self.width;
            for piece in *group {
                end += piece.length;
                longest = longest.max(piece.length);
                found.push(end as i32);
            }
            if end < rest {
                longest = longest.max(rest - end);
                end = rest;
                found.push(end as i32);
            }
        }
        Ok((found, longest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::rows::Documents;
    use crate::simd::Level;
    use proptest::prelude::*;

    const OFFSETS: [i64; 5] = [0, 3, 3, 4, 6];
    const TOKENS: [i32; 6] = [10, 11, 12, 13, 14, 15];

    fn engines() -> Vec<Engine> {
        Level::ALL.into_iter().filter_map(|level| Engine::new(level).ok()).collect()
    }

    fn tokens(vocabulary: i64) -> Plane<'static> {
        Plane::Tokens { values: Values::Narrow(&TOKENS), padding: 1, vocabulary }
    }

    fn pieces(rows: &[i64]) -> Vec<Piece> {
        Documents { offsets: &OFFSETS, values: 6 }.pieces(rows, 9).unwrap()
    }

    #[test]
    fn padded_rows() {
        let pieces = pieces(&[0, PADDING, 1, 3]);
        for engine in engines() {
            let rows = |left| Rows { engine, pieces: &pieces, bounds: None, width: 3, left };
            let mut out = [7; 48];
            let labels = Plane::Labels { values: None, joined: false };
            let positions = Plane::Positions { joined: false };
            rows(false).write(&[tokens(16), Plane::Mask, labels, positions], &mut out).unwrap();
            assert_eq!(out[..12], [10, 11, 12, 1, 1, 1, 1, 1, 1, 14, 15, 1]);
            assert_eq!(out[12..24], [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]);
            assert_eq!(out[24..36], [10, 11, 12, -100, -100, -100, -100, -100, -100, 14, 15, -100]);
            assert_eq!(out[36..], [0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            rows(true).write(&[tokens(16), Plane::Mask], &mut out[..24]).unwrap();
            assert_eq!(out[..12], [10, 11, 12, 1, 1, 1, 1, 1, 1, 1, 14, 15]);
            assert_eq!(out[12..24], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1]);
        }
    }

    #[test]
    fn joined_rows() {
        let pieces = pieces(&[3, PADDING, 1, 0]);
        for engine in engines() {
            let rows = Rows { engine, pieces: &pieces, bounds: Some(&[0, 3, 3, 4]), width: 4, left: false };
            let mut out = [7; 48];
            let column = [0i64, -1, -2, -3, -4, -5];
            let labels = Plane::Labels { values: Some(Values::Wide(&column)), joined: true };
            let positions = Plane::Positions { joined: true };
            rows.write(&[tokens(16), labels, positions, Plane::Samples(Some(&[5, 6, 7, 8]))], &mut out).unwrap();
            assert_eq!(out[..12], [14, 15, 1, 1, 1, 1, 1, 1, 10, 11, 12, 1]);
            assert_eq!(out[12..24], [-100, -5, -100, -100, -100, -100, -100, -100, -100, -1, -2, -100]);
            assert_eq!(out[24..36], [0, 1, 0, 0, 0, 1, 2, 3, 0, 1, 2, 0]);
            assert_eq!(out[36..], [8, 8, -1, -1, -1, -1, -1, -1, 5, 5, 5, -1]);
            assert_eq!(rows.boundaries(), Ok((vec![0, 2, 3, 3, 4, 8, 11, 12], 4)));
            let full = Rows { pieces: &pieces[..3], bounds: Some(&[0, 3]), width: 3, ..rows };
            assert_eq!(full.boundaries(), Ok((vec![0, 2, 3, 3], 2)), "a full row has no padding");
        }
    }

    proptest! {
        #[test]
        fn bounds_of_any_kind_are_no_panic(bounds: Vec<i64>, small in prop::collection::vec(-1..5i64, 0..5), width in 0..5usize) {
            let pieces = pieces(&[3, PADDING, 1, 0]);
            for bounds in [&bounds, &small] {
                let rows = Rows { engine: engines()[0], pieces: &pieces, bounds: Some(bounds), width, left: false };
                let size = bounds.len().saturating_sub(1) * width;
                let right = bounds.is_sorted() && bounds.first() == Some(&0) && bounds.last() == Some(&4);
                let fits = right && bounds.windows(2).all(|at| {
                    (at[0]..at[1]).map(|piece| [2, 1, 0, 3][piece as usize]).sum::<usize>() <= width
                });
                prop_assert_eq!(rows.write(&[tokens(16)], &mut vec![0; size]).is_ok(), fits);
                prop_assert_eq!(rows.boundaries().is_ok(), fits);
            }
        }
    }

    #[test]
    fn what_is_refused() {
        let pieces = pieces(&[0, 3]);
        let rows = Rows { engine: engines()[0], pieces: &pieces, bounds: None, width: 3, left: false };
        let mut out = [7; 6];
        assert_eq!(
            rows.write(&[tokens(15)], &mut out),
            Err(Error::Token { row: 3, position: 1, token: 15, vocabulary: 15 })
        );
        assert_eq!(rows.write(&[tokens(16)], &mut out[..5]), Err(Error::Memory { given: 5, wanted: 6 }));
        let short = Plane::Column { values: Values::Wide(&[1; 5]), padding: 0 };
        assert_eq!(rows.write(&[short], &mut out), Err(Error::Memory { given: 5, wanted: 6 }));
        assert_eq!(rows.write(&[Plane::Samples(Some(&[1; 3]))], &mut out), Err(Error::Row { row: 3, rows: 3 }));
        assert_eq!(samples(None, &[1], &mut []), Err(Error::Memory { given: 0, wanted: 1 }));
        assert_eq!(rows.write(&[], &mut []), Ok(()));
        let narrow = Rows { width: 2, ..rows };
        assert_eq!(narrow.write(&[tokens(16)], &mut out[..4]), Err(Error::Memory { given: 2, wanted: 3 }));
        let wide = Rows { width: 1 << 30, ..rows };
        assert!(matches!(wide.boundaries(), Err(Error::Range { name: "length", .. })));
    }
}
