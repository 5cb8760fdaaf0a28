//! The extension module `hiddenkey_rs._core`: convert, release the GIL, call one core function, convert back.

mod errors;

use numpy::{PyArray1, PyArrayDyn, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArrayDyn};
use pyo3::prelude::*;

use crate::error::at_most;
use crate::mask::{self, Shape, bits};
use crate::rng::philox::philox4x32;
use crate::rng::stream::Site;
use errors::raise;

type Words<'py> = PyResult<Bound<'py, PyArrayDyn<u32>>>;

/// Run `work` without the GIL and hand its words over as an array of `shape`.
fn masks<'py>(py: Python<'py>, shape: [usize; 4], work: impl FnOnce() -> crate::Result<Vec<u32>> + Send) -> Words<'py> {
    let words = py.detach(work).map_err(raise)?;
    PyArray1::from_vec(py, words).reshape(shape.to_vec())
}

#[allow(clippy::too_many_arguments)]
#[pyfunction]
fn element<'py>(
    py: Python<'py>,
    seed: u64,
    step: u64,
    branch: u64,
    layer: u64,
    site: u64,
    samples: PyReadonlyArray1<'py, u64>,
    heads: usize,
    rows: usize,
    columns: usize,
    threshold: u32,
) -> Words<'py> {
    let samples = samples.as_slice()?;
    masks(py, [samples.len(), heads, rows, bits::words(columns)], || {
        let key = Site { seed, step, branch, layer, site }.key()?;
        mask::element(key, Shape { samples, heads, rows, columns }, threshold)
    })
}

#[allow(clippy::too_many_arguments)]
#[pyfunction]
fn column<'py>(
    py: Python<'py>,
    seed: u64,
    step: u64,
    branch: u64,
    layer: u64,
    site: u64,
    samples: PyReadonlyArray1<'py, u64>,
    heads: usize,
    columns: usize,
    threshold: u32,
) -> Words<'py> {
    let samples = samples.as_slice()?;
    masks(py, [samples.len(), heads, 1, bits::words(columns)], || {
        let key = Site { seed, step, branch, layer, site }.key()?;
        mask::column(key, Shape { samples, heads, rows: 1, columns }, threshold)
    })
}

#[allow(clippy::too_many_arguments)]
#[pyfunction]
fn span<'py>(
    py: Python<'py>,
    seed: u64,
    step: u64,
    branch: u64,
    layer: u64,
    site: u64,
    samples: PyReadonlyArray1<'py, u64>,
    lengths: PyReadonlyArray1<'py, u32>,
    heads: usize,
    columns: usize,
    threshold: u32,
) -> Words<'py> {
    let (samples, lengths) = (samples.as_slice()?, lengths.as_slice()?);
    masks(py, [samples.len(), heads, 1, bits::words(columns)], || {
        let key = Site { seed, step, branch, layer, site }.key()?;
        mask::span(key, Shape { samples, heads, rows: 1, columns }, lengths, threshold)
    })
}

#[pyfunction]
fn unpack<'py>(
    py: Python<'py>,
    words: PyReadonlyArrayDyn<'py, u32>,
    columns: usize,
) -> PyResult<Bound<'py, PyArrayDyn<bool>>> {
    let mut shape = words.as_array().shape().to_vec();
    let width = shape.pop().unwrap_or(0);
    shape.push(columns);
    let packed = words.as_slice()?;
    let keep = py.detach(|| bits::unpack(packed, columns, width)).map_err(raise)?;
    PyArray1::from_vec(py, keep).reshape(shape)
}

#[pyfunction]
fn philox<'py>(py: Python<'py>, counters: PyReadonlyArray2<'py, u32>, key: (u32, u32)) -> Words<'py> {
    let rows = counters.as_array().nrows();
    at_most("counter words", counters.as_array().ncols() as u64, 4).map_err(raise)?;
    let flat = counters.as_slice()?;
    let outputs: Vec<u32> =
        flat.chunks_exact(4).flat_map(|c| philox4x32([c[0], c[1], c[2], c[3]], [key.0, key.1])).collect();
    PyArray1::from_vec(py, outputs).reshape(vec![rows, 4])
}

#[pyfunction]
fn derive_key(seed: u64, step: u64, branch: u64, layer: u64, site: u64) -> PyResult<(u32, u32)> {
    let key = Site { seed, step, branch, layer, site }.key().map_err(raise)?;
    Ok((key.0[0], key.0[1]))
}

#[pyfunction]
fn threshold(rate: f64) -> PyResult<u32> {
    mask::threshold::threshold(rate).map_err(raise)
}

/// The instruction set that masks are made with.
#[pyfunction]
fn simd() -> &'static str {
    "portable"
}

#[pyfunction]
fn debug_build() -> bool {
    cfg!(debug_assertions)
}

#[pymodule(gil_used = false)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(element, module)?)?;
    module.add_function(wrap_pyfunction!(column, module)?)?;
    module.add_function(wrap_pyfunction!(span, module)?)?;
    module.add_function(wrap_pyfunction!(unpack, module)?)?;
    module.add_function(wrap_pyfunction!(philox, module)?)?;
    module.add_function(wrap_pyfunction!(derive_key, module)?)?;
    module.add_function(wrap_pyfunction!(threshold, module)?)?;
    module.add_function(wrap_pyfunction!(simd, module)?)?;
    module.add_function(wrap_pyfunction!(debug_build, module)?)?;
    module.add("STREAM", crate::STREAM)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}
