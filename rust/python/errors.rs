//! The one map from core errors to Python exceptions.

use pyo3::PyErr;
use pyo3::exceptions::PyKeyboardInterrupt;

use crate::Error;

pyo3::import_exception!(hiddenkey_rs.errors, ConfigError);
pyo3::import_exception!(hiddenkey_rs.errors, DataError);

/// The exception of an error: arguments are a `ConfigError`, data that does not fit a `DataError`.
pub fn raise(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Range { name: "sample" | "length" | "position" | "kept rows", .. }
        | Error::Negative { .. }
        | Error::Lengths { .. }
        | Error::Words { .. }
        | Error::Empty
        | Error::Budget { .. }
        | Error::Memory { .. }
        | Error::Pieces(_)
        | Error::NegativeLength { .. }
        | Error::TooLong { .. }
        | Error::Row { .. }
        | Error::Offsets { .. }
        | Error::Piece { .. }
        | Error::Token { .. } => DataError::new_err(text),
        Error::Range { .. }
        | Error::Rate(_)
        | Error::Scale(_)
        | Error::Pattern(_)
        | Error::Simd(_)
        | Error::Capacity(_)
        | Error::Room { .. } => ConfigError::new_err(text),
        Error::Interrupted => PyKeyboardInterrupt::new_err(text),
    }
}
