//! Structured dropout masks as a pure function of their coordinates.
//!
//! A mask bit depends on (seed, step, branch, layer, site, sample, head, row, column) and on nothing else: there is no
//! generator state. The stream is named `hk1`; `DESIGN.md` has its counter table. Layers: `error <- rng <- simd <-
//! threads <- mask <- apply`, and `threads <- batch`; nothing imports `python`, the only module that knows PyO3.

pub mod apply;
pub mod batch;
pub mod error;
pub mod mask;
#[cfg(feature = "python")]
mod python;
pub mod rng;
pub mod simd;
pub mod threads;

pub use error::{Error, Result};

/// The name of the stream. Changing any bit of any mask is a new name.
pub const STREAM: &str = "hk1";
