//! Wrappers of `batch::pack` and `batch::pad`.

use numpy::{
    IntoPyArray, PyArray1, PyArrayDescrMethods, PyReadonlyArray1, PyReadwriteArray3, PyReadwriteArrayDyn,
    PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use super::{call, raise, read, write};
use crate::batch::pack::{Packing, TooLong, pack as pack_lengths};
use crate::batch::pad::{self, Plane, Rows};
use crate::batch::rows::{Documents, Values};

/// Integers of 32 or 64 bits to read.
enum Integers<'py> {
    Narrow(PyReadonlyArray1<'py, i32>),
    Wide(PyReadonlyArray1<'py, i64>),
}

// By hand, and by the width of an item: to try one kind after the other costs microseconds, an exception a failure.
impl<'py> FromPyObject<'_, 'py> for Integers<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if object.cast::<PyUntypedArray>()?.dtype().itemsize() == 4 {
            Ok(Integers::Narrow(object.extract()?))
        } else {
            Ok(Integers::Wide(object.extract()?))
        }
    }
}

impl Integers<'_> {
    fn values(&self) -> PyResult<Values<'_>> {
        Ok(match self {
            Integers::Narrow(array) => Values::Narrow(read(array)?),
            Integers::Wide(array) => Values::Wide(read(array)?),
        })
    }
}

type Array<'py, T> = Bound<'py, PyArray1<T>>;

/// Offsets, documents, starts, lengths and the number of tokens.
type Packed<'py> = (Array<'py, i64>, Array<'py, i64>, Array<'py, i64>, Array<'py, i64>, u64);

/// `too_long`: 0 refuse, 1 truncate, 2 split.
#[pyfunction]
fn pack<'py>(py: Python<'py>, lengths: Integers<'py>, capacity: u64, too_long: u8) -> PyResult<Packed<'py>> {
    let too_long = match too_long {
        0 => TooLong::Refuse,
        1 => TooLong::Truncate,
        _ => TooLong::Split,
    };
    let lengths = lengths.values()?;
    let mut packing = Packing::default();
    call(py, |run| {
        packing = match lengths {
            Values::Narrow(lengths) => pack_lengths(run, lengths, capacity, too_long)?,
            Values::Wide(lengths) => pack_lengths(run, lengths, capacity, too_long)?,
        };
        Ok(())
    })?;
    let Packing { offsets, documents, starts, lengths, tokens } = packing;
    let array = |values: Vec<i64>| values.into_pyarray(py);
    Ok((array(offsets), array(documents), array(starts), array(lengths), tokens))
}

/// Of rows of at most `limit` tokens: the longest one's length, and all lengths together.
#[pyfunction]
fn extent<'py>(
    offsets: PyReadonlyArray1<'py, i64>,
    values: usize,
    rows: PyReadonlyArray1<'py, i64>,
    limit: usize,
) -> PyResult<(usize, usize)> {
    Documents { offsets: read(&offsets)?, values }.extent(read(&rows)?, limit).map_err(raise)
}

/// Token ids, then labels and token types if the store has them.
type Columns<'py> = (Integers<'py>, Option<Integers<'py>>, Option<Integers<'py>>);
/// Documents, the starts and lengths of pieces of them, and where each row's pieces begin.
type Pieces<'py> = (
    PyReadonlyArray1<'py, i64>,
    Option<(PyReadonlyArray1<'py, i64>, PyReadonlyArray1<'py, i64>)>,
    Option<PyReadonlyArray1<'py, i64>>,
);

/// `numbers`: the most tokens a document, the id of padding, the size of the vocabulary. `flags`: padding on the left (of
/// rows that hold one piece), a mask, labels that are the tokens, positions. Planes: ids, mask, labels, token types,
/// positions. `samples`: ids, and where to write them. Returns, where rows hold several pieces, the boundaries of
/// documents and the longest one's length.
#[allow(clippy::too_many_arguments)]
#[pyfunction]
fn gather<'py>(
    py: Python<'py>,
    columns: Columns<'py>,
    offsets: PyReadonlyArray1<'py, i64>,
    pieces: Pieces<'py>,
    numbers: (usize, i64, i64),
    flags: (bool, bool, bool, bool),
    samples: (Option<PyReadonlyArray1<'py, i64>>, PyReadwriteArrayDyn<'py, i64>),
    mut out: PyReadwriteArray3<'py, i64>,
) -> PyResult<Option<(Array<'py, i32>, usize)>> {
    let ((limit, padding, vocabulary), (left, mask, copied, positions)) = (numbers, flags);
    let tokens = columns.0.values()?;
    let labels = columns.1.as_ref().map(Integers::values).transpose()?;
    let types = columns.2.as_ref().map(Integers::values).transpose()?;
    let documents = Documents { offsets: read(&offsets)?, values: tokens.len() };
    let (rows, bounds) = (read(&pieces.0)?, pieces.2.as_ref().map(read).transpose()?);
    let cuts = pieces.1.as_ref().map(|(starts, lengths)| Ok::<_, PyErr>((read(starts)?, read(lengths)?)));
    let cuts = cuts.transpose()?;
    let (ids, mut sample_out) = samples;
    let ids = ids.as_ref().map(read).transpose()?;
    let (sample_out, width) = (write(&mut sample_out)?, out.shape()[2]);
    let out = write(&mut out)?;
    let joined = bounds.is_some();
    let mut found = None;
    call(py, |run| {
        let pieces = match cuts {
            Some((starts, lengths)) => documents.cut(rows, starts, lengths)?,
            None => documents.pieces(rows, limit)?,
        };
        let rows_of = Rows { engine: run.engine, pieces: &pieces, bounds, width, left: left && !joined };
        let mut planes = vec![Plane::Tokens { values: tokens, padding, vocabulary }];
        planes.extend(mask.then_some(Plane::Mask));
        planes.extend((copied || labels.is_some()).then_some(Plane::Labels { values: labels, joined }));
        planes.extend(types.map(|values| Plane::Column { values, padding: 0 }));
        planes.extend(positions.then_some(Plane::Positions { joined }));
        rows_of.write(&planes, out)?;
        if joined {
            rows_of.write(&[Plane::Samples(ids)], sample_out)?;
            found = Some(rows_of.boundaries()?);
            Ok(())
        } else {
            pad::samples(ids, rows, sample_out)
        }
    })?;
    Ok(found.map(|(bounds, longest)| (bounds.into_pyarray(py), longest)))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(pack, module)?)?;
    module.add_function(wrap_pyfunction!(extent, module)?)?;
    module.add_function(wrap_pyfunction!(gather, module)?)
}
