//! Data sets: from a file of rows to token ids with the targets marked.
//!
//! `files.rs` opens files and folders, `json.rs`, `table.rs` and `parquet.rs` are the kinds of them, `columns.rs` what columns mean, `messages.rs` what
//! conversations hold, `read.rs` makes rows of all that, `row.rs` what they are; `split.rs` holds some of them out, `render.rs` makes an
//! example of a row, `dataset.rs` all examples and the report on them, `order.rs` the steps of an epoch; `near.rs` finds rows that are nearly the same; `names.rs` what messages call the settings; `sample.rs` shows an
//! example to a person; `write.rs` makes a file of rows.

mod columns;
mod dataset;
mod files;
mod json;
mod messages;
mod names;
mod near;
mod order;
#[cfg(feature = "parquet")]
mod parquet;
mod read;
mod render;
mod row;
mod sample;
mod split;
mod table;
#[cfg(test)]
mod testing;
mod write;

pub use columns::{ColumnMap, DataFormat, RowFormat, Taken};
pub use dataset::{Class, DataReport, Dataset, LengthBin, RowCount};
pub use files::Files;
pub(crate) use files::read_text;
pub use names::Names;
pub use order::{batches, order, steps_per_epoch};
pub use read::{Counted, DataFile, OnBadRow, ReadOptions, Reading, UnknownColumns, read_columns, read_rows};
pub use render::{
    Dropped, EncodeOptions, Encoded, Encoder, Example, Overlong, Written, instruction_messages, plain_prompt,
};
pub use row::{Row, RowText};
pub use sample::decoded_sample;
pub use split::split;
pub use write::to_jsonl;
