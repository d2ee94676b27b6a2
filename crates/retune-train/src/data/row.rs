//! A row as text, whatever file and format it comes from.

use retune_text::chat_template::{Conversation, Message};

/// One row of a data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its number among the file's rows, from 0.
    pub index: usize,
    /// The line it starts on, from 1.
    pub line: usize,
    pub text: RowText,
}

/// What a row says. Rows with equal texts are duplicates.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RowText {
    Chat(Conversation),
    PromptCompletion { prompt: String, completion: String },
    Instruction { instruction: String, input: String, output: String },
    Text(String),
}

impl RowText {
    /// Whether an answer of the row, or its whole text, is empty or blank.
    pub fn has_empty_answer(&self) -> bool {
        match self {
            RowText::Text(text) => text.trim().is_empty(),
            // A turn that calls tools says something.
            RowText::Chat(conversation) => {
                conversation.answers().any(|turn| turn.text().trim().is_empty() && turn.more.is_empty())
            }
            _ => self.answers().iter().any(|answer| answer.trim().is_empty()),
        }
    }

    /// All that the row says, as plain text, without the words that a template puts around it.
    pub fn plain_text(&self) -> String {
        let with_ends = |pieces: &[&str]| -> String {
            let pieces = pieces.iter().filter(|piece| !piece.is_empty());
            pieces.flat_map(|piece| [piece, "\n"]).collect()
        };
        match self {
            RowText::Chat(conversation) => {
                conversation.messages.iter().map(Message::text).collect::<Vec<_>>().join("\n")
            }
            RowText::PromptCompletion { prompt, completion } => format!("{prompt}{completion}"),
            RowText::Instruction { instruction, input, output } => with_ends(&[instruction, input, output]),
            RowText::Text(text) => text.clone(),
        }
    }

    /// What the row asks first, as plain text, or the text that it is; `None` of a conversation in which no user speaks.
    pub fn question(&self) -> Option<String> {
        Some(match self {
            RowText::Chat(conversation) => {
                conversation.messages.iter().find(|message| message.role == "user")?.text().to_owned()
            }
            RowText::PromptCompletion { prompt, .. } => prompt.clone(),
            RowText::Instruction { instruction, input, .. } => format!("{instruction} {input}"),
            RowText::Text(text) => text.clone(),
        })
    }

    /// The answers of the row; none of a text, which is learnt whole.
    pub fn answers(&self) -> Vec<&str> {
        match self {
            RowText::Chat(conversation) => conversation.answers().map(Message::text).collect(),
            RowText::PromptCompletion { completion: answer, .. } | RowText::Instruction { output: answer, .. } => {
                vec![answer.as_str()]
            }
            RowText::Text(_) => Vec::new(),
        }
    }

    /// The row with another last answer, in the place of the words of its own, and nothing after it; `None` of a row without answers.
    pub fn with_answer(&self, answer: &str) -> Option<RowText> {
        let instead_of = |own: &str| match own.split_once(own.trim()) {
            Some((before, after)) => format!("{before}{answer}{after}"),
            None => answer.to_owned(),
        };
        Some(match self {
            RowText::Chat(Conversation { messages, variables }) => {
                let last = messages.iter().rposition(Message::is_answer)?;
                let mut messages = messages.get(..=last)?.to_vec();
                let turn = messages.last_mut()?;
                *turn = Message::new(turn.role.as_str(), instead_of(turn.text()));
                RowText::Chat(Conversation { messages, variables: variables.clone() })
            }
            RowText::PromptCompletion { prompt, completion } => {
                RowText::PromptCompletion { prompt: prompt.clone(), completion: instead_of(completion) }
            }
            RowText::Instruction { instruction, input, output } => RowText::Instruction {
                instruction: instruction.clone(),
                input: input.clone(),
                output: instead_of(output),
            },
            RowText::Text(_) => return None,
        })
    }

    /// What the last answer answers, in pieces; `None` where nobody asks anything.
    pub(super) fn prompt(&self) -> Option<Vec<&str>> {
        let pieces: Vec<&str> = match self {
            RowText::Chat(Conversation { messages, .. }) => {
                let last = messages.iter().rposition(Message::is_answer)?;
                let before = messages.get(..last).unwrap_or_default();
                if before.iter().all(|message| message.role == "system") {
                    return None;
                }
                before.iter().flat_map(|message| [message.role.as_str(), message.text()]).collect()
            }
            RowText::PromptCompletion { prompt, .. } => vec![prompt.as_str()],
            RowText::Instruction { instruction, input, .. } => vec![instruction.as_str(), input.as_str()],
            RowText::Text(_) => return None,
        };
        pieces.iter().any(|piece| !piece.trim().is_empty()).then_some(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(turns: &[(&str, &str)]) -> RowText {
        RowText::Chat(turns.iter().map(|(role, text)| Message::new(*role, *text)).collect::<Vec<_>>().into())
    }

    #[test]
    fn the_plain_text_leaves_nothing_out() {
        let turns = chat(&[("system", "s"), ("user", "u"), ("assistant", "a")]);
        let instruction =
            |input: &str| RowText::Instruction { instruction: "do".into(), input: input.into(), output: "done".into() };
        let pair = RowText::PromptCompletion { prompt: "x ".into(), completion: "y".into() };
        let rows = [&turns, &instruction("in"), &instruction(""), &pair, &RowText::Text("t".into())];
        assert_eq!(rows.map(RowText::plain_text), ["s\nu\na", "do\nin\ndone\n", "do\ndone\n", "x y", "t"]);
        let questions = rows.map(|row| row.question().unwrap_or_default());
        assert_eq!(questions, ["u", "do in", "do ", "x ", "t"]);
        assert_eq!(chat(&[("system", "s")]).question(), None);
    }

    #[test]
    fn another_answer_stands_where_the_last_one_stood() {
        let turns = [("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", " b\n"), ("user", "w")];
        let RowText::Chat(changed) = chat(&turns).with_answer("yes").unwrap() else { panic!("no conversation") };
        let contents: Vec<_> = changed.messages.iter().map(Message::text).collect();
        assert_eq!(contents, ["u", "a", "v", " yes\n"], "the white space is part of what the model learnt");
        let pair = |completion: &str| RowText::PromptCompletion { prompt: "x".into(), completion: completion.into() };
        assert_eq!(pair(" y z").with_answer("no"), Some(pair(" no")));
        assert_eq!(pair(" ").with_answer("no"), Some(pair("no ")));
        let instruction =
            |output: &str| RowText::Instruction { instruction: "do".into(), input: "in".into(), output: output.into() };
        assert_eq!(instruction("done").with_answer("no"), Some(instruction("no")));
        assert_eq!(RowText::Text("t".into()).with_answer("no"), None);
        assert_eq!(chat(&[("user", "u")]).with_answer("no"), None);
    }

    #[test]
    fn blank_answers_are_noticed() {
        assert!(RowText::Text(" \n".into()).has_empty_answer());
        assert!(chat(&[("assistant", ""), ("assistant", "a")]).has_empty_answer());
        assert!(!chat(&[("user", ""), ("assistant", "a")]).has_empty_answer());
        assert!(RowText::PromptCompletion { prompt: "p".into(), completion: "".into() }.has_empty_answer());
    }
}
