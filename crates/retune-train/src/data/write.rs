//! Rows back to a file: JSON lines with the usual columns, whatever file they were read from.

use serde_json::{Value, json};

use super::read::{Row, RowText};

/// Rows as JSON lines, which [`super::read_rows`] reads as the same rows, whatever their format.
pub fn to_jsonl(rows: &[Row]) -> String {
    rows.iter().map(|row| format!("{}\n", to_json(&row.text))).collect()
}

fn to_json(text: &RowText) -> Value {
    match text {
        RowText::Chat(messages) => json!({ "messages": messages }),
        RowText::PromptCompletion { prompt, completion } => json!({ "prompt": prompt, "completion": completion }),
        RowText::Instruction { instruction, input, output } => {
            json!({ "instruction": instruction, "input": input, "output": output })
        }
        RowText::Text(text) => json!({ "text": text }),
    }
}

#[cfg(test)]
mod tests {
    use retune_text::chat_template::Message;

    use super::super::{ColumnMap, DataFormat, Names, read_rows};
    use super::*;

    #[test]
    fn rows_that_were_written_are_read_as_the_same() {
        let turn = |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
        let texts = [
            RowText::Chat(vec![turn("user", "a \"b\"\n"), turn("assistant", "c")]),
            RowText::PromptCompletion { prompt: " p\u{2028}".to_owned(), completion: " \u{1f980}".to_owned() },
            RowText::Instruction { instruction: "i".to_owned(), input: String::new(), output: "o".to_owned() },
            RowText::Text("t".to_owned()),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        for text in texts {
            let rows = [0, 1].map(|index| Row { index, line: index + 1, text: text.clone() });
            std::fs::write(&path, to_jsonl(&rows)).unwrap();
            let read = read_rows(&path, DataFormat::Auto, &ColumnMap::default(), &Names::KEYS).unwrap();
            assert_eq!(read.rows, rows);
        }
    }
}
