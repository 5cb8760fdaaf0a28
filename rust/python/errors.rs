//! The one map from core errors to Python exceptions.

use pyo3::PyErr;

use crate::Error;

pyo3::import_exception!(hiddenkey_rs.errors, ConfigError);
pyo3::import_exception!(hiddenkey_rs.errors, DataError);

/// The exception of an error: arguments are a `ConfigError`, data that does not fit a `DataError`.
pub fn raise(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Range { name: "sample" | "length", .. } | Error::Lengths { .. } | Error::Words { .. } => {
            DataError::new_err(text)
        }
        Error::Range { .. } | Error::Rate(_) | Error::Memory { .. } => ConfigError::new_err(text),
    }
}
