//! Data sets: from a file of rows to token ids with the targets marked.
//!
//! `read.rs` makes rows of a file, `split.rs` holds some of them out, `render.rs` makes an example of a row, `dataset.rs` all
//! examples and the report on them, `order.rs` the steps of an epoch; `names.rs` what messages call the settings; `sample.rs` shows an example to a person; `write.rs` makes a file of rows.

mod dataset;
mod names;
mod order;
mod read;
mod render;
mod sample;
mod split;
#[cfg(test)]
mod testing;
mod write;

pub use dataset::{DataReport, Dataset, LengthBin, RowCount};
pub use names::Names;
pub use order::{batches, order, steps_per_epoch};
pub(crate) use read::read_text;
pub use read::{ColumnMap, DataFile, DataFormat, Row, RowFormat, RowText, read_columns, read_rows};
pub use render::{Dropped, EncodeOptions, Encoded, Encoder, Example, Overlong, instruction_messages, plain_prompt};
pub use sample::decoded_sample;
pub use split::split;
pub use write::to_jsonl;
