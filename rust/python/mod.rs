//! The extension module `hiddenkey_rs._core`: convert, release the GIL, call one core function, convert back.
//!
//! Results are written into arrays that the caller made: NumPy's allocator knows large pages, and memory can be reused.
//! No other thread may write to an array, or resize it, while a call works on it without the GIL.

mod batch_order;
mod batch_rows;
mod errors;

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use numpy::ndarray::Dimension;
use numpy::{
    BorrowError, Element, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyReadonlyArray, PyReadonlyArray1,
    PyReadonlyArray2, PyReadonlyArray3, PyReadonlyArray4, PyReadonlyArrayDyn, PyReadwriteArray, PyReadwriteArray1,
    PyReadwriteArray3, PyReadwriteArrayDyn, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::mask::plan::{Documents, Entry, Planned};
use crate::mask::{self, Shape, bits};
use crate::rng::stream::{Site, SiteKey};
use crate::simd::{Engine, Float};
use crate::threads::{Run, default_threads};
use crate::{Error, Result, apply};
use errors::{DataError, raise};

/// Threads that `set_threads` asked for; 0 = the default.
static THREADS: AtomicUsize = AtomicUsize::new(0);

fn threads() -> usize {
    match THREADS.load(Ordering::Relaxed) {
        0 => default_threads(),
        asked => asked,
    }
}

/// Run `work` without the GIL. Ctrl-C (any signal whose handler raises) stops it and comes out as its own exception.
fn call(py: Python<'_>, work: impl FnOnce(&Run<'_>) -> Result<()> + Send) -> PyResult<()> {
    // Both with the GIL held: a child forked in the middle of finding them out would wait for them for ever.
    let (engine, threads) = (Engine::chosen().map_err(raise)?, threads());
    let (outcome, signal) = py.detach(|| {
        let signal = Cell::new(None);
        let interrupted = || {
            // The interpreter may be gone: a process ends while other threads draw.
            let raised = Python::try_attach(|py| py.check_signals()).and_then(|checked| checked.err());
            let stop = raised.is_some();
            signal.set(raised);
            stop
        };
        let outcome = work(&Run { engine, threads, interrupted: &interrupted });
        (outcome, signal.into_inner())
    });
    match (outcome, signal) {
        (Ok(()), _) => Ok(()),
        (Err(Error::Interrupted), Some(raised)) => Err(raised),
        (Err(error), _) => Err(raise(error)),
    }
}

/// An array's memory in the order of its indices; a `DataError` where it lies in another one.
fn read<'a, T: Element, D: Dimension>(array: &'a PyReadonlyArray<'_, T, D>) -> PyResult<&'a [T]> {
    if !array.is_c_contiguous() {
        return Err(unfit(&format!("strides of {:?} bytes", array.strides())));
    }
    array.as_slice().map_err(|_| unfit("misaligned memory"))
}

/// As [`read`], to write.
fn write<'a, T: Element, D: Dimension>(array: &'a mut PyReadwriteArray<'_, T, D>) -> PyResult<&'a mut [T]> {
    if !array.is_c_contiguous() {
        return Err(unfit(&format!("strides of {:?} bytes", array.strides())));
    }
    array.as_slice_mut().map_err(|_| unfit("misaligned memory"))
}

fn unfit(got: &str) -> PyErr {
    DataError::new_err(format!(
        "an array must be aligned and lie in memory row by row (got {got}); pass numpy.ascontiguousarray of it, or a copy"
    ))
}

/// An array that no call writes to; a `DataError` where one does, or this one would.
fn to_read<'py, T: Element>(array: &Bound<'py, PyUntypedArray>) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
    array.cast::<PyArrayDyn<T>>()?.try_readonly().map_err(|_| in_use())
}

/// An array that no other call uses.
fn to_write<'py, T: Element>(array: &Bound<'py, PyUntypedArray>) -> PyResult<PyReadwriteArrayDyn<'py, T>> {
    match array.cast::<PyArrayDyn<T>>()?.try_readwrite() {
        Ok(array) => Ok(array),
        Err(BorrowError::NotWriteable) => Err(unfit("memory that is only for reading")),
        Err(_) => Err(in_use()),
    }
}

/// The last axis must have `wanted` numbers.
fn numbers_each(given: usize, wanted: u128) -> PyResult<()> {
    if given as u128 == wanted { Ok(()) } else { Err(raise(Error::Memory { given, wanted })) }
}

fn in_use() -> PyErr {
    DataError::new_err(
        "an array is written to while it is in use (got one array twice, or one that another thread works on); pass \
         memory of its own for the result",
    )
}

/// An array to write: packed words, or one byte a decision.
enum Room<'py> {
    Words(PyReadwriteArrayDyn<'py, u32>),
    Bytes(PyReadwriteArrayDyn<'py, u8>),
}

// By hand, and by the width of an item: to try one kind after the other costs microseconds, an exception a failure.
impl<'py> Room<'py> {
    fn of(array: &Bound<'py, PyUntypedArray>) -> PyResult<Self> {
        if array.dtype().itemsize() == 1 {
            Ok(Room::Bytes(to_write(array)?))
        } else {
            Ok(Room::Words(to_write(array)?))
        }
    }
}

/// (seed, step, branch, layer, site code).
type SiteWords = (u64, u64, u64, u64, u64);

fn key((seed, step, branch, layer, site): SiteWords) -> Result<SiteKey> {
    Site { seed, step, branch, layer, site }.key()
}

#[allow(clippy::too_many_arguments)]
#[pyfunction]
fn element<'py>(
    py: Python<'py>,
    site: SiteWords,
    samples: PyReadonlyArray1<'py, u64>,
    heads: usize,
    rows: usize,
    columns: usize,
    threshold: u32,
    out: Bound<'py, PyUntypedArray>,
) -> PyResult<()> {
    let shape = Shape { samples: read(&samples)?, heads, rows, columns };
    match Room::of(&out)? {
        Room::Words(mut out) => {
            let out = write(&mut out)?;
            call(py, |run| mask::element(run, key(site)?, shape, threshold, out))
        }
        Room::Bytes(mut out) => {
            let out = write(&mut out)?;
            call(py, |run| mask::element_bytes(run, key(site)?, shape, threshold, out))
        }
    }
}

#[allow(clippy::too_many_arguments)]
#[pyfunction]
fn column<'py>(
    py: Python<'py>,
    site: SiteWords,
    samples: PyReadonlyArray1<'py, u64>,
    lengths: Option<PyReadonlyArray1<'py, u32>>,
    heads: usize,
    columns: usize,
    threshold: u32,
    mut out: PyReadwriteArrayDyn<'py, u32>,
) -> PyResult<()> {
    let shape = Shape { samples: read(&samples)?, heads, rows: 1, columns };
    let lengths = lengths.as_ref().map(read).transpose()?;
    let out = write(&mut out)?;
    call(py, |run| mask::column(run, key(site)?, shape, lengths, threshold, out))
}

#[allow(clippy::too_many_arguments)]
#[pyfunction]
fn span<'py>(
    py: Python<'py>,
    site: SiteWords,
    samples: PyReadonlyArray1<'py, u64>,
    lengths: PyReadonlyArray1<'py, u32>,
    heads: usize,
    columns: usize,
    threshold: u32,
    mut out: PyReadwriteArrayDyn<'py, u32>,
) -> PyResult<()> {
    let shape = Shape { samples: read(&samples)?, heads, rows: 1, columns };
    let (lengths, out) = (read(&lengths)?, write(&mut out)?);
    call(py, |run| mask::span(run, key(site)?, shape, lengths, threshold, out))
}

#[pyfunction]
fn unpack<'py>(
    py: Python<'py>,
    words: PyReadonlyArrayDyn<'py, u32>,
    columns: usize,
    mut out: PyReadwriteArrayDyn<'py, u8>,
) -> PyResult<()> {
    let (packed, out) = (read(&words)?, write(&mut out)?);
    call(py, |run| bits::unpack(run, packed, columns, out))
}

/// `entries`: (n, 5), each (layer, site code, 1 for column or 2 for span, heads, threshold).
#[allow(clippy::too_many_arguments)]
#[pyfunction]
fn plan<'py>(
    py: Python<'py>,
    seed: u64,
    step: u64,
    entries: PyReadonlyArray2<'py, u64>,
    samples: PyReadonlyArray1<'py, u64>,
    branches: PyReadonlyArray1<'py, u64>,
    lengths: PyReadonlyArray1<'py, u32>,
    columns: usize,
    mut words: PyReadwriteArray1<'py, u32>,
    mut counts: PyReadwriteArray1<'py, u32>,
) -> PyResult<()> {
    let entry = |numbers: &[u64; 5]| {
        let [layer, site, pattern, heads, threshold] = *numbers;
        let threshold = u32::try_from(threshold).unwrap_or(u32::MAX);
        Ok(Entry { layer, site, pattern: Planned::of(pattern)?, heads: heads as usize, threshold })
    };
    numbers_each(entries.shape()[1], 5)?;
    let entries: Result<Vec<Entry>> = read(&entries)?.as_chunks().0.iter().map(entry).collect();
    let entries = entries.map_err(raise)?;
    let documents =
        Documents { samples: read(&samples)?, branches: read(&branches)?, lengths: read(&lengths)?, columns };
    let (words, counts) = (write(&mut words)?, write(&mut counts)?);
    call(py, |run| mask::plan::plan(run, (seed, step), &entries, documents, words, counts))
}

/// Hidden states to read and to write: float32, or 16 bits (bfloat16; where nothing is computed, float16 too).
enum Hidden<'py> {
    Single(PyReadonlyArrayDyn<'py, f32>, PyReadwriteArrayDyn<'py, f32>),
    Brain(PyReadonlyArrayDyn<'py, u16>, PyReadwriteArrayDyn<'py, u16>),
}

/// Hidden states to read, and to write.
type Pair<'py> = (Bound<'py, PyUntypedArray>, Bound<'py, PyUntypedArray>);

impl<'py> Hidden<'py> {
    fn of((from, to): &Pair<'py>) -> PyResult<Self> {
        if from.dtype().itemsize() == 2 {
            Ok(Hidden::Brain(to_read(from)?, to_write(to)?))
        } else {
            Ok(Hidden::Single(to_read(from)?, to_write(to)?))
        }
    }
}

/// Returns how many places were kept.
#[allow(clippy::too_many_arguments)]
#[pyfunction]
fn dropout<'py>(
    py: Python<'py>,
    site_key: (u32, u32),
    samples: PyReadonlyArray1<'py, i64>,
    positions: PyReadonlyArray1<'py, i64>,
    threshold: u32,
    scale: f32,
    hidden: Pair<'py>,
) -> PyResult<u64> {
    let key = SiteKey([site_key.0, site_key.1]);
    let rows = apply::Rows { samples: read(&samples)?, positions: read(&positions)? };
    fn apply_to<F: Float>(
        py: Python<'_>,
        key: SiteKey,
        rows: apply::Rows<'_>,
        (threshold, scale): (u32, f32),
        x: &[F],
        out: &mut [F],
    ) -> PyResult<u64> {
        let mut kept = 0;
        call(py, |run| apply::element(run, key, rows, threshold, scale, x, out).map(|count| kept = count))?;
        Ok(kept)
    }
    match Hidden::of(&hidden)? {
        Hidden::Single(x, mut out) => apply_to(py, key, rows, (threshold, scale), read(&x)?, write(&mut out)?),
        Hidden::Brain(x, mut out) => apply_to(py, key, rows, (threshold, scale), read(&x)?, write(&mut out)?),
    }
}

#[pyfunction]
fn dropout_rows<'py>(py: Python<'py>, keep: PyReadonlyArray1<'py, u8>, scale: f32, hidden: Pair<'py>) -> PyResult<()> {
    let keep = read(&keep)?;
    match Hidden::of(&hidden)? {
        Hidden::Single(x, mut out) => {
            let (x, out) = (read(&x)?, write(&mut out)?);
            call(py, |run| apply::rows(run, keep, scale, x, out))
        }
        Hidden::Brain(x, mut out) => {
            let (x, out) = (read(&x)?, write(&mut out)?);
            call(py, |run| apply::rows(run, keep, scale, x, out))
        }
    }
}

/// `back`: lay `hidden.0`, the short rows, into `hidden.1`; else gather `hidden.0`'s kept rows into it.
#[allow(clippy::too_many_arguments)]
#[pyfunction]
fn keep_rows<'py>(
    py: Python<'py>,
    keep: PyReadonlyArray3<'py, u8>,
    places: PyReadonlyArray1<'py, u32>,
    features: usize,
    heads_inside: bool,
    back: bool,
    hidden: Pair<'py>,
) -> PyResult<()> {
    let [batch, heads, length] = [0, 1, 2].map(|axis| keep.shape()[axis]);
    let layout = apply::Layout { batch, heads, length, features, heads_inside };
    let kept = apply::Kept { keep: read(&keep)?, places: read(&places)? };
    fn work<F: Float + Default>(
        py: Python<'_>,
        layout: apply::Layout,
        kept: apply::Kept<'_>,
        back: bool,
        from: &[F],
        to: &mut [F],
    ) -> PyResult<()> {
        call(py, |run| {
            if back { apply::scatter(run, layout, kept, from, to) } else { apply::gather(run, layout, kept, from, to) }
        })
    }
    match Hidden::of(&hidden)? {
        Hidden::Single(from, mut to) => work(py, layout, kept, back, read(&from)?, write(&mut to)?),
        Hidden::Brain(from, mut to) => work(py, layout, kept, back, read(&from)?, write(&mut to)?),
    }
}

/// `out`: (n, queries, 3), as [`apply::Seen`].
#[pyfunction]
fn seen_keys<'py>(
    py: Python<'py>,
    allowed: PyReadonlyArray4<'py, u8>,
    mut out: PyReadwriteArray3<'py, u32>,
) -> PyResult<()> {
    let keys = allowed.shape()[3];
    numbers_each(out.shape()[2], 3)?;
    let (allowed, out) = (read(&allowed)?, write(&mut out)?.as_chunks_mut().0);
    call(py, |run| apply::seen(run, allowed, keys, out))
}

/// `forbidden`: the bits of -inf. Returns how many pairs are kept and how many rows see no key.
#[allow(clippy::too_many_arguments)]
#[pyfunction]
fn block_mask<'py>(
    py: Python<'py>,
    allowed: PyReadonlyArray4<'py, u8>,
    seen: PyReadonlyArray3<'py, u32>,
    keep: PyReadonlyArray4<'py, u8>,
    own: bool,
    rows: (usize, usize),
    columns: (usize, usize),
    forbidden: u32,
    out: Bound<'py, PyUntypedArray>,
    mut empty: PyReadwriteArray1<'py, u8>,
) -> PyResult<(u64, u64)> {
    let shape = |array: &[usize]| [0, 1, 2, 3].map(|axis| array[axis]);
    numbers_each(seen.shape()[2], 3)?;
    let pairs = apply::Pairs {
        allowed: apply::Bits { shape: shape(allowed.shape()), bits: read(&allowed)? },
        seen: read(&seen)?.as_chunks().0,
        keep: apply::Bits { shape: shape(keep.shape()), bits: read(&keep)? },
        own,
    };
    let block = (rows.0..rows.1, columns.0..columns.1);
    let empty = write(&mut empty)?;
    let mut counts = apply::Counts { kept: 0, empty: 0 };
    if out.dtype().itemsize() == 2 {
        let mut out = to_write::<u16>(&out)?;
        let out = write(&mut out)?;
        call(py, |run| apply::block(run, pairs, block, forbidden as u16, out, empty).map(|found| counts = found))?;
    } else {
        let mut out = to_write::<u32>(&out)?;
        let out = write(&mut out)?;
        call(py, |run| apply::block(run, pairs, block, forbidden, out, empty).map(|found| counts = found))?;
    }
    Ok((counts.kept, counts.empty))
}

#[pyfunction]
fn derive_key(site: SiteWords) -> PyResult<(u32, u32)> {
    let key = key(site).map_err(raise)?;
    Ok((key.0[0], key.0[1]))
}

/// What makes the masks: stream, instruction set, threads, kind of build.
#[pyfunction]
fn info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let found = PyDict::new(py);
    found.set_item("stream", crate::STREAM)?;
    found.set_item("simd", Engine::chosen().map_err(raise)?.level().name())?;
    found.set_item("threads", threads())?;
    found.set_item("build", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    Ok(found)
}

/// This process was just forked.
#[pyfunction]
fn forked() {
    crate::threads::forked();
}

/// Use so many threads; 0 = the default.
#[pyfunction]
fn set_threads(count: usize) {
    THREADS.store(count, Ordering::Relaxed);
}

#[pymodule(gil_used = false)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(element, module)?)?;
    module.add_function(wrap_pyfunction!(column, module)?)?;
    module.add_function(wrap_pyfunction!(span, module)?)?;
    module.add_function(wrap_pyfunction!(unpack, module)?)?;
    module.add_function(wrap_pyfunction!(plan, module)?)?;
    module.add_function(wrap_pyfunction!(dropout, module)?)?;
    module.add_function(wrap_pyfunction!(dropout_rows, module)?)?;
    module.add_function(wrap_pyfunction!(keep_rows, module)?)?;
    module.add_function(wrap_pyfunction!(seen_keys, module)?)?;
    module.add_function(wrap_pyfunction!(block_mask, module)?)?;
    module.add_function(wrap_pyfunction!(derive_key, module)?)?;
    module.add_function(wrap_pyfunction!(info, module)?)?;
    module.add_function(wrap_pyfunction!(set_threads, module)?)?;
    batch_order::register(module)?;
    batch_rows::register(module)?;
    // Threads do not survive a fork, and a child may get a number that its parent had.
    if let Ok(register) = module.py().import("os")?.getattr("register_at_fork") {
        let told = PyDict::new(module.py());
        told.set_item("after_in_child", wrap_pyfunction!(forked, module)?)?;
        register.call((), Some(&told))?;
    }
    module.add("STREAM", crate::STREAM)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}
