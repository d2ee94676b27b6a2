//! Rows back to a file: JSON lines with the usual columns, whatever file they were read from.

use retune_text::chat_template::Message;
use serde_json::{Value, json};

use super::read::VARIABLES;
use super::row::{Row, RowText};

/// Rows as JSON lines, which [`super::read_rows`] reads as the same rows, whatever their format.
pub fn to_jsonl(rows: &[Row]) -> String {
    rows.iter().map(|row| format!("{}\n", to_json(&row.text))).collect()
}

fn to_json(text: &RowText) -> Value {
    match text {
        RowText::Chat(conversation) => {
            let turn = |turn: &Message| {
                let mut value = json!(turn);
                if turn.masked {
                    value["train"] = false.into();
                }
                value
            };
            let mut row = json!({ "messages": conversation.messages.iter().map(turn).collect::<Vec<_>>() });
            if !conversation.variables.is_empty() {
                row[VARIABLES] = Value::Object(conversation.variables.clone());
            }
            row
        }
        RowText::PromptCompletion { prompt, completion } => json!({ "prompt": prompt, "completion": completion }),
        RowText::Instruction { instruction, input, output } => {
            json!({ "instruction": instruction, "input": input, "output": output })
        }
        RowText::Text(text) => json!({ "text": text }),
    }
}

#[cfg(test)]
mod tests {
    use retune_text::chat_template::Conversation;

    use super::super::{Files, ReadOptions, read_rows};
    use super::*;

    #[test]
    fn rows_that_were_written_are_read_as_the_same() {
        let called = Message {
            content: None,
            more: serde_json::from_str(
                r#"{"tool_calls": [{"function": {"name": "f", "arguments": {"b": 1, "a": null}}}]}"#,
            )
            .unwrap(),
            masked: true,
            ..Message::new("assistant", "")
        };
        let with_tools = Conversation {
            messages: vec![Message::new("user", "u"), called, Message::new("assistant", "c")],
            variables: serde_json::from_str(r#"{"tools": [{"name": "f"}]}"#).unwrap(),
        };
        let texts = [
            RowText::Chat(vec![Message::new("user", "a \"b\"\n"), Message::new("assistant", "c")].into()),
            RowText::Chat(with_tools),
            RowText::PromptCompletion { prompt: " p\u{2028}".to_owned(), completion: " \u{1f980}".to_owned() },
            RowText::Instruction { instruction: "i".to_owned(), input: String::new(), output: "o".to_owned() },
            RowText::Text("t".to_owned()),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        for text in texts {
            let rows = [0, 1].map(|index| Row { index, line: index + 1, text: text.clone() });
            std::fs::write(&path, to_jsonl(&rows)).unwrap();
            let read = read_rows(&Files::from(&path), &ReadOptions::AUTO).unwrap();
            assert_eq!(read.rows, rows);
        }
    }
}
