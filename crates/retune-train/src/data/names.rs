//! What messages call the settings of a data set.

/// What messages call the settings of a data set: the keys of a run file, or the flags of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// The file of rows.
    pub rows: &'static str,
    /// All of the columns' names.
    pub columns: &'static str,
    /// What stands before a column's own name.
    pub column: &'static str,
    pub format: &'static str,
    pub max_length: &'static str,
    /// What is done with rows that are too long, where that can be chosen.
    pub overlong: Option<&'static str>,
    /// What is done with columns that are not read, where that can be chosen.
    pub unknown_columns: Option<&'static str>,
}

impl Names {
    /// The keys of a run file.
    pub const KEYS: Names = Names {
        rows: "data.train",
        columns: "data.columns",
        column: "data.columns.",
        format: "data.format",
        max_length: "data.max_length",
        overlong: Some("data.overlong"),
        unknown_columns: Some("data.unknown_columns"),
    };
}

impl Default for Names {
    fn default() -> Self {
        Self::KEYS
    }
}
