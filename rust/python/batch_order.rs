//! Wrappers of `batch::order`, `batch::schedule` and `batch::share`.

use numpy::{PyReadonlyArray1, PyReadwriteArray1, PyReadwriteArray3, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::errors::raise;
use super::{call, read, write};
use crate::batch::order::{Order, SAMPLES};
use crate::batch::schedule::{Cut, Epoch};
use crate::batch::share::Share;

/// (seed, epoch, whether anything is drawn).
type Drawn = (u64, u64, bool);
/// (positions used, samples of a window, samples of a batch or 0, tokens of a batch).
type Sizes = (u64, u64, u64, u64);

fn epoch((seed, epoch, shuffle): Drawn, (used, window, rows, tokens): Sizes, lengths: &[u32]) -> Epoch<'_> {
    let cut = if rows > 0 { Cut::Rows(rows) } else { Cut::Tokens(tokens) };
    Epoch { seed, epoch, shuffle, lengths, used, window, cut }
}

#[pyfunction]
fn order<'py>(
    py: Python<'py>,
    seed: u64,
    epoch: u64,
    size: u64,
    start: u64,
    mut out: PyReadwriteArray1<'py, i64>,
) -> PyResult<()> {
    let out = write(&mut out)?;
    call(py, |run| Order::new(seed, epoch, SAMPLES, size)?.fill(run, start, out))
}

/// The order at one place (and the GIL kept: it takes less than to let go of it), or its inverse.
#[pyfunction]
fn order_at(seed: u64, epoch: u64, size: u64, place: u64, inverse: bool) -> PyResult<u64> {
    let order = Order::new(seed, epoch, SAMPLES, size).map_err(raise)?;
    let found = if inverse { order.position(place) } else { order.sample(place) };
    found.map_err(raise)
}

/// Fills `samples` and `ends`; returns how many batches the window has.
#[pyfunction]
fn schedule<'py>(
    py: Python<'py>,
    drawn: Drawn,
    sizes: Sizes,
    lengths: PyReadonlyArray1<'py, u32>,
    window: u64,
    mut samples: PyReadwriteArray1<'py, i64>,
    mut ends: PyReadwriteArray1<'py, i64>,
) -> PyResult<usize> {
    let lengths = read(&lengths)?;
    let (samples, ends) = (write(&mut samples)?, write(&mut ends)?);
    let mut batches = 0;
    call(py, |run| epoch(drawn, sizes, lengths).window(run, window, samples, ends).map(|count| batches = count))?;
    Ok(batches)
}

/// Fills `counts` with every window's number of batches.
#[pyfunction]
fn schedule_counts<'py>(
    py: Python<'py>,
    drawn: Drawn,
    sizes: Sizes,
    lengths: PyReadonlyArray1<'py, u32>,
    mut counts: PyReadwriteArray1<'py, i64>,
) -> PyResult<()> {
    let (lengths, counts) = (read(&lengths)?, write(&mut counts)?);
    call(py, |run| epoch(drawn, sizes, lengths).counts(run, counts))
}

/// Fills `out`, (ranks, micro-batches, 2), with (start, end) of every micro-batch within the batch.
#[pyfunction]
fn share<'py>(
    py: Python<'py>,
    samples: PyReadonlyArray1<'py, i64>,
    lengths: PyReadonlyArray1<'py, u32>,
    mut out: PyReadwriteArray3<'py, i64>,
) -> PyResult<()> {
    let [ranks, micro] = [0, 1].map(|axis| out.shape()[axis]);
    let (samples, lengths, out) = (read(&samples)?, read(&lengths)?, write(&mut out)?);
    call(py, |_| Share { ranks, micro }.bounds(samples, lengths, out))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(order, module)?)?;
    module.add_function(wrap_pyfunction!(order_at, module)?)?;
    module.add_function(wrap_pyfunction!(schedule, module)?)?;
    module.add_function(wrap_pyfunction!(schedule_counts, module)?)?;
    module.add_function(wrap_pyfunction!(share, module)?)?;
    module.add("ORDER_STREAM", crate::batch::order::ORDER_STREAM)
}
