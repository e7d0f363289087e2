//! An error with what caused it, in one line: for logs, tables and JSON, where only text can go.

use std::error::Error;

/// The error's own words and those of each cause in turn, a colon between them.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
