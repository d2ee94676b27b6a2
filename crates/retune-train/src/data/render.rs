//! A row to token ids with the targets marked.
//!
//! A text is always encoded whole, never in pieces, so that the ids are those a model meets when it is used; which tokens are
//! targets is told afterwards by the bytes they stand for. A token with bytes of both the prompt and the answer is a target.
//!
//! Conversations, and instructions for a model that has a chat template, are rendered with it. Instructions for a model without
//! one get the plain form of [`plain_prompt`].

use std::borrow::Cow;
use std::ops::Range;

use retune_text::chat_template::{Conversation, Message};
use retune_text::tokenizer::Tokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::names::Names;
use super::read::OnBadRow;
use super::row::{Row, RowText};
use crate::error::{Error, quoted, shortened};

/// What is done with rows longer than allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// Cut off on the right; a row left with nothing to train on is dropped. Both are counted in the data report.
    #[default]
    Truncate,
    /// Left out, and counted in the data report.
    Drop,
    /// An error.
    Error,
}

/// How rows become examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Tokens an example may have.
    pub max_length: usize,
    pub overlong: Overlong,
    /// What is done with rows that cannot be encoded.
    pub on_bad_row: OnBadRow,
    /// Whether prompts are targets too.
    pub train_on_prompt: bool,
    /// Whether the model has an encoder, which reads what the answer answers.
    pub has_encoder: bool,
    /// What messages call these.
    pub names: Names,
}

/// A row as the model sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The row's number in its file: what dropout is keyed by.
    pub row: usize,
    /// What an encoder reads, where the model has one: the tokens that `ids` answer.
    pub source: Vec<u32>,
    pub ids: Vec<u32>,
    /// For each token whether it is a target, predicted from the tokens before it; the first never is, unless there is a source.
    pub trained: Vec<bool>,
}

impl Example {
    /// Tokens of the longer of its two sides.
    pub fn longest(&self) -> usize {
        self.ids.len().max(self.source.len())
    }

    /// Tokens of both sides.
    pub fn tokens(&self) -> usize {
        self.ids.len() + self.source.len()
    }

    /// How many tokens are targets.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().filter(|&&trained| trained).count()
    }
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Encoded {
    /// An example, how many of the row's tokens were cut off, and what the chat template made of the row.
    Kept {
        example: Example,
        cut: usize,
        written: Written,
    },
    Dropped(Dropped),
}

/// Why a row gives no example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// It is longer than allowed.
    TooLong,
    /// What is allowed of it ends before the first target.
    CutAway,
    /// Nothing in it is a target.
    Empty,
}

/// What a chat template did with the words of a row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Written {
    /// An answer that is not in the text as the row has it, and what stands there instead: some of it was cut or replaced.
    pub changed: Option<(String, String)>,
    /// Whether an answer lost white space at its ends, and nothing else.
    pub trimmed: bool,
    /// What the row hands to the template (`tools`, `reasoning_content`) that is not in the text.
    pub left_out: Vec<String>,
}

/// Ids and, for each, whether it is a target.
type Labelled = (Vec<u32>, Vec<bool>);

/// Makes examples of rows for one model.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    options: EncodeOptions,
    /// Answers that a conversation begins with which are no targets.
    given_answers: usize,
    /// The token that ends a plain text.
    eos: u32,
}

impl<'a> Encoder<'a> {
    /// # Errors
    /// A tokenizer without a token that ends generation; prompts that are to be targets of a model whose encoder reads them.
    pub fn new(tokenizer: &'a Tokenizer, options: EncodeOptions) -> Result<Self, Error> {
        if options.has_encoder && options.train_on_prompt {
            return Err(Error::PromptOfEncoder);
        }
        let eos = *tokenizer.eos_token_ids().first().ok_or(Error::NoEosToken)?;
        Ok(Encoder { tokenizer, options, given_answers: 0, eos })
    }

    /// The same, for conversations whose first answers, `count` of them, are given: they are no targets.
    pub fn after_answers(self, count: usize) -> Self {
        Encoder { given_answers: count, ..self }
    }

    pub fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer
    }

    pub fn options(&self) -> EncodeOptions {
        self.options
    }

    /// The example of a row, held to the length allowed.
    ///
    /// # Errors
    /// A conversation without an assistant's turn, or that the template does not fit; a row too long, where that is an error.
    pub fn encode(&self, row: &Row) -> Result<Encoded, Error> {
        let (mut example, written) = self.whole(row)?;
        let EncodeOptions { max_length, overlong, .. } = self.options;
        let cut_of_source = example.source.len().saturating_sub(max_length);
        let cut = example.ids.len().saturating_sub(max_length) + cut_of_source;
        if cut > 0 {
            match overlong {
                Overlong::Truncate => {
                    example.ids.truncate(max_length);
                    example.trained.truncate(max_length);
                    if let Some(end) = example.source.last().copied().filter(|_| cut_of_source > 0) {
                        // As tokenizers cut a text: what ends it stays.
                        example.source.truncate(max_length.saturating_sub(1));
                        example.source.push(end);
                    }
                }
                Overlong::Drop => return Ok(Encoded::Dropped(Dropped::TooLong)),
                Overlong::Error => {
                    return Err(Error::TooLong {
                        tokens: example.longest(),
                        max_length,
                        key: self.options.names.max_length,
                    });
                }
            }
        }
        let says_nothing = self.options.has_encoder && example.longest() == 1;
        if example.trained_tokens() == 0 || says_nothing {
            return Ok(Encoded::Dropped(if cut > 0 { Dropped::CutAway } else { Dropped::Empty }));
        }
        Ok(Encoded::Kept { example, cut, written })
    }

    /// The example of a row, whatever its length. Its last token is one that ends generation.
    pub fn encode_whole(&self, row: &Row) -> Result<Example, Error> {
        Ok(self.whole(row)?.0)
    }

    fn whole(&self, row: &Row) -> Result<(Example, Written), Error> {
        let mut written = Written::default();
        if self.options.has_encoder {
            let (source, answer) = source_and_answer(&row.text)?;
            let (source, ids) = (self.ended(&source)?, self.ended(answer)?);
            return Ok((Example { row: row.index, source, trained: vec![true; ids.len()], ids }, written));
        }
        let (ids, mut trained) = match &row.text {
            RowText::Chat(conversation) => self.chat(conversation, &mut written)?,
            RowText::PromptCompletion { prompt, completion } => self.plain(prompt, completion)?,
            RowText::Instruction { instruction, input, output } if self.tokenizer.chat_template().is_some() => {
                let conversation = instruction_messages(instruction, input, output).to_vec().into();
                self.chat(&conversation, &mut written)?
            }
            RowText::Instruction { instruction, input, output } => {
                self.plain(&plain_prompt(instruction, input), output)?
            }
            RowText::Text(text) => self.plain("", text)?,
        };
        if self.options.train_on_prompt {
            trained.fill(true);
        }
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        Ok((Example { row: row.index, source: Vec::new(), ids, trained }, written))
    }

    /// A text with what the tokenizer puts around it, and EOS at its end.
    pub(super) fn ended(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = self.tokenizer.encode_with_special_tokens(text)?;
        if !ids.last().is_some_and(|id| self.tokenizer.eos_token_ids().contains(id)) {
            ids.push(self.eos);
        }
        Ok(ids)
    }

    /// Every assistant turn is trained: what the template adds for it to the turns before it and the opening of an answer, up to
    /// the last token that ends generation. What follows the last trained token is left out. BOS is the template's affair.
    fn chat(&self, conversation: &Conversation, written: &mut Written) -> Result<Labelled, Error> {
        let template = self.tokenizer.chat_template().ok_or(Error::NoChatTemplate)?;
        let Conversation { messages, variables } = conversation;
        let turns =
            messages.iter().rposition(Message::is_answer).and_then(|last| messages.get(..=last)).ok_or_else(|| {
                Error::NoAssistantTurn { roles: quoted(messages.iter().map(|message| message.role.as_str())) }
            })?;
        let render = |turns: &[Message], opened: bool| -> Result<String, Error> {
            Ok(template.render_with(turns, variables, opened)?)
        };
        let text = render(turns, false)?;
        *written = Written { left_out: left_out(turns, variables, &text), ..Written::default() };
        let (mut ids, ranges) = self.tokenizer.encode_with_offsets(&text)?;
        let mut trained = vec![false; ids.len()];
        let mut end = 0;
        let answers = turns.iter().enumerate().filter(|(_, message)| message.is_answer());
        for (turn, message) in answers.skip(self.given_answers).filter(|(_, message)| !message.masked) {
            let span = answer_span(turns, turn, &text, render)?;
            written.compare(message.text(), text.get(span.clone()).unwrap_or_default());
            let tokens: Vec<usize> = (0..ids.len()).filter(|&token| overlap(ranges.get(token), &span)).collect();
            let eos = |token: &usize| ids.get(*token).is_some_and(|id| self.tokenizer.eos_token_ids().contains(id));
            let closed = tokens.iter().rposition(eos).and_then(|closing| tokens.get(..=closing));
            let answer = closed.ok_or_else(|| self.no_eos(turn, text.get(span).unwrap_or_default()))?;
            for &token in answer {
                if let Some(trained) = trained.get_mut(token) {
                    *trained = true;
                }
                end = token + 1;
            }
        }
        ids.truncate(end);
        trained.truncate(end);
        Ok((ids, trained))
    }

    fn no_eos(&self, turn: usize, found: &str) -> Error {
        let tokens: Vec<String> =
            self.tokenizer.eos_token_ids().iter().filter_map(|&id| self.tokenizer.id_to_token(id)).collect();
        Error::TemplateWithoutEos {
            turn: turn + 1,
            found: shortened(found, 60),
            expected: quoted(tokens.iter().map(String::as_str)),
        }
    }

    /// A prompt and its answer as they are, with what the tokenizer puts before a text (BOS) and EOS after the answer, unless
    /// they are there already.
    fn plain(&self, prompt: &str, answer: &str) -> Result<Labelled, Error> {
        let text = format!("{prompt}{answer}");
        let (encoded, ranges) = self.tokenizer.encode_with_offsets(&text)?;
        let with_special = self.tokenizer.encode_with_special_tokens(&text)?;
        let mut starts = 0..=with_special.len().saturating_sub(encoded.len());
        let before = starts.find(|&start| with_special.get(start..).is_some_and(|rest| rest.starts_with(&encoded)));
        let mut ids: Vec<u32> = with_special.get(..before.unwrap_or(0)).unwrap_or_default().to_vec();
        let mut trained = vec![false; ids.len()];
        let span = prompt.len()..text.len();
        trained.extend(ranges.iter().map(|range| overlap(Some(range), &span)));
        ids.extend(encoded);
        if !ids.last().is_some_and(|id| self.tokenizer.eos_token_ids().contains(id)) {
            ids.push(self.eos);
            trained.push(true);
        } else if let Some(last) = trained.last_mut() {
            *last = true;
        }
        Ok((ids, trained))
    }
}

impl Written {
    /// Notes what became of an answer in the text that the template wrote for it.
    fn compare(&mut self, answer: &str, text: &str) {
        if text.contains(answer) {
            return;
        }
        if text.contains(answer.trim()) {
            self.trimmed = true;
        } else if self.changed.is_none() {
            self.changed = Some((answer.to_owned(), text.to_owned()));
        }
    }
}

/// What of the things that a row hands to a template beside its turns' texts is not in the text: a thought is looked for as it stands,
/// functions and calls by their names.
fn left_out(turns: &[Message], variables: &Map<String, Value>, text: &str) -> Vec<String> {
    let names = |value: &Value| -> Vec<String> {
        let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let name = |entry: &Value| {
            entry.pointer("/function/name").or_else(|| entry.get("name")).and_then(Value::as_str).map(str::to_owned)
        };
        list.iter().filter_map(name).collect()
    };
    let mut found: Vec<String> = Vec::new();
    let mut note = |key: &str, pieces: Vec<String>| {
        if pieces.iter().any(|piece| !text.contains(piece.trim())) && !found.iter().any(|known| known == key) {
            found.push(key.to_owned());
        }
    };
    for (key, value) in turns.iter().flat_map(|turn| &turn.more) {
        match key.as_str() {
            "tool_calls" | "function_call" => note(key, names(value)),
            "reasoning_content" | "reasoning" | "thinking" | "tool_plan" => {
                note(key, value.as_str().map(str::to_owned).into_iter().collect())
            }
            // Names and numbers of calls, which templates may do without.
            _ => {}
        }
    }
    if let Some(tools) = variables.get("tools") {
        note("tools", names(tools));
    }
    found
}

/// What an encoder reads of a row, and what is to be answered.
///
/// # Errors
/// A text that answers nothing; a conversation of more than a question and its answer.
fn source_and_answer(row: &RowText) -> Result<(Cow<'_, str>, &str), Error> {
    match row {
        RowText::PromptCompletion { prompt, completion } => Ok((Cow::Borrowed(prompt.as_str()), completion.as_str())),
        RowText::Instruction { instruction, input, output } => {
            Ok((instruction_and_input(instruction, input), output.as_str()))
        }
        RowText::Text(_) => Err(Error::TextWithoutSource),
        RowText::Chat(Conversation { messages, .. }) => match messages.as_slice() {
            [question, answer] if question.role == "user" && answer.is_answer() => {
                Ok((Cow::Borrowed(question.text()), answer.text()))
            }
            _ => Err(Error::TurnsOfEncoder { roles: quoted(messages.iter().map(|message| message.role.as_str())) }),
        },
    }
}

/// An instruction and what it is about.
fn instruction_and_input<'a>(instruction: &'a str, input: &str) -> Cow<'a, str> {
    if input.is_empty() { Cow::Borrowed(instruction) } else { Cow::Owned(format!("{instruction}\n\n{input}")) }
}

/// The bytes of `text`, which is `turns` rendered, that the assistant adds with the turn of this number.
fn answer_span(
    turns: &[Message],
    turn: usize,
    text: &str,
    render: impl Fn(&[Message], bool) -> Result<String, Error>,
) -> Result<Range<usize>, Error> {
    let before = render(turns.get(..turn).unwrap_or_default(), true)?;
    let through = render(turns.get(..=turn).unwrap_or_default(), false)?;
    for (what, start, whole) in
        [("the opened answer", &before, through.as_str()), ("the conversation up to this message", &through, text)]
    {
        if !whole.starts_with(start.as_str()) {
            let common = start.char_indices().zip(whole.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
            let at = common.unwrap_or(start.len().min(whole.len()));
            let after = |text: &str| shortened(text.get(at..).unwrap_or_default(), 40);
            let found = format!("{what} goes on with {:?}, where {:?} was expected", after(start), after(whole));
            return Err(Error::TemplateNotIncremental { turn: turn + 1, found });
        }
    }
    Ok(before.len()..through.len())
}

/// Whether a token with this byte range belongs to the span. A token without bytes belongs to what follows it.
fn overlap(range: Option<&Range<usize>>, span: &Range<usize>) -> bool {
    range.is_some_and(|range| range.start < span.end && (range.end > span.start || range.start >= span.start))
}

/// The conversation that an instruction with its answer is.
pub fn instruction_messages(instruction: &str, input: &str, output: &str) -> [Message; 2] {
    let user = instruction_and_input(instruction, input).into_owned();
    [Message::new("user", user), Message::new("assistant", output)]
}

/// The prompt of an instruction for a model without a chat template, in the form the Alpaca models made common:
///
/// ```text
/// ### Instruction:
/// …
///
/// ### Input:
/// …
///
/// ### Response:
/// ```
///
/// ending in a line break. Without an input that part is left out.
pub fn plain_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        format!("### Instruction:\n{instruction}\n\n### Response:\n")
    } else {
        format!("### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
    }
}

#[cfg(test)]
mod tests {
    use super::super::decoded_sample;
    use super::super::testing::{CHATML, tokenizer, tokenizer_with};
    use super::*;

    const OPTIONS: EncodeOptions = EncodeOptions {
        max_length: 1000,
        overlong: Overlong::Truncate,
        on_bad_row: OnBadRow::Stop,
        train_on_prompt: false,
        has_encoder: false,
        names: Names::KEYS,
    };

    fn row(text: RowText) -> Row {
        Row { index: 3, line: 5, text }
    }

    fn chat(messages: &[(&str, &str)]) -> Row {
        let messages: Vec<_> = messages.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        row(RowText::Chat(messages.into()))
    }

    fn whole(tokenizer: &Tokenizer, options: EncodeOptions, row: &Row) -> Example {
        let example = Encoder::new(tokenizer, options).unwrap().encode_whole(row).unwrap();
        assert_eq!((example.row, example.ids.len()), (3, example.trained.len()));
        assert!(!example.trained[0]);
        assert!(example.trained.last() == Some(&true), "the last token is trained");
        assert!(tokenizer.eos_token_ids().contains(example.ids.last().unwrap()), "the last token is EOS");
        example
    }

    /// The example as text, trained parts between «».
    fn shown(tokenizer: &Tokenizer, example: &Example) -> String {
        let pieces = decoded_sample(tokenizer, example);
        pieces.into_iter().map(|(text, trained)| if trained { format!("«{text}»") } else { text }).collect()
    }

    fn error(tokenizer: &Tokenizer, row: &Row) -> String {
        Encoder::new(tokenizer, OPTIONS).unwrap().encode(row).unwrap_err().to_string()
    }

    #[test]
    fn every_answer_is_trained_with_its_end_and_nothing_follows_the_last() {
        let tokenizer = tokenizer();
        let row = chat(&[
            ("system", "s"),
            ("user", "u1"),
            ("assistant", "a1 é"),
            ("user", "u2"),
            ("assistant", "a2"),
            ("user", "u3"),
        ]);
        let example = whole(&tokenizer, OPTIONS, &row);
        assert_eq!(
            shown(&tokenizer, &example),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\n«a1 é<|im_end|>»\n\
             <|im_start|>user\nu2<|im_end|>\n<|im_start|>assistant\n«a2<|im_end|>»"
        );
        let text = "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>";
        let example = whole(&tokenizer, OPTIONS, &chat(&[("user", "u"), ("assistant", "a")]));
        assert_eq!(example.ids, tokenizer.encode(text).unwrap(), "the ids are those of the text, with no BOS added");
        let example = whole(&tokenizer, EncodeOptions { train_on_prompt: true, ..OPTIONS }, &row);
        assert_eq!(example.trained_tokens(), example.ids.len() - 1);
        let example = whole(&tokenizer, OPTIONS, &chat(&[("user", "u"), ("assistant", "")]));
        assert_eq!(example.trained_tokens(), 1, "an empty answer is its end alone");
        let example = whole(&tokenizer, OPTIONS, &chat(&[("user", "u"), ("assistant", "a<|im_end|>b")]));
        assert!(shown(&tokenizer, &example).ends_with("\n«a<|im_end|>b<|im_end|>»"));
    }

    #[test]
    fn a_token_of_prompt_and_answer_is_trained() {
        // The tokenizer merges "a" and "b".
        let tokenizer = tokenizer_with(Some("{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>"));
        let encoder = Encoder::new(&tokenizer, OPTIONS).unwrap();
        let merged = encoder
            .encode_whole(&row(RowText::PromptCompletion { prompt: "xa".into(), completion: "bx".into() }))
            .unwrap();
        assert_eq!(shown(&tokenizer, &merged), "<s>x«abx</s>»");
        let apart = encoder
            .encode_whole(&row(RowText::PromptCompletion { prompt: "xb".into(), completion: "ax".into() }))
            .unwrap();
        assert_eq!(shown(&tokenizer, &apart), "<s>xb«ax</s>»");
    }

    #[test]
    fn plain_texts_get_bos_and_eos_once() {
        let tokenizer = tokenizer();
        let text = |text: &str| shown(&tokenizer, &whole(&tokenizer, OPTIONS, &row(RowText::Text(text.into()))));
        assert_eq!(text("xy"), "<s>«xy</s>»");
        assert_eq!(text("<s>xy"), "<s>«xy</s>»");
        assert_eq!(text("xy</s>"), "<s>«xy</s>»");
        assert_eq!(text(" é\n"), "<s>« é\n</s>»");
        let pair = |prompt: &str, completion: &str| {
            let row = row(RowText::PromptCompletion { prompt: prompt.into(), completion: completion.into() });
            shown(&tokenizer, &whole(&tokenizer, OPTIONS, &row))
        };
        assert_eq!(pair("Q: é\n", "é!"), "<s>Q: é\n«é!</s>»");
        assert_eq!(pair("x", ""), "<s>x«</s>»");
        assert_eq!(pair("", "x"), "<s>«x</s>»");
        assert_eq!(pair("x", "y<|im_end|>"), "<s>x«y<|im_end|>»", "any token that ends generation will do");
        let ids = whole(&tokenizer, OPTIONS, &row(RowText::Text("xy".into()))).ids;
        let mut expected = tokenizer.encode_with_special_tokens("xy").unwrap();
        expected.push(tokenizer.eos_token_ids()[0]);
        assert_eq!(ids, expected);
    }

    #[test]
    fn instructions_use_the_template_or_the_plain_form() {
        let instruction = |input: &str| {
            row(RowText::Instruction { instruction: "do".into(), input: input.into(), output: "done".into() })
        };
        let chat_model = tokenizer();
        let text = |input: &str| shown(&chat_model, &whole(&chat_model, OPTIONS, &instruction(input)));
        assert_eq!(text(""), "<|im_start|>user\ndo<|im_end|>\n<|im_start|>assistant\n«done<|im_end|>»");
        assert_eq!(text("in"), "<|im_start|>user\ndo\n\nin<|im_end|>\n<|im_start|>assistant\n«done<|im_end|>»");
        let base_model = tokenizer_with(None);
        let text = |input: &str| shown(&base_model, &whole(&base_model, OPTIONS, &instruction(input)));
        assert_eq!(text(""), "<s>### Instruction:\ndo\n\n### Response:\n«done</s>»");
        assert_eq!(text("in"), "<s>### Instruction:\ndo\n\n### Input:\nin\n\n### Response:\n«done</s>»");
    }

    #[test]
    fn given_answers_are_no_targets() {
        let tokenizer = tokenizer();
        let turns = chat(&[("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]);
        let given = |count| {
            let encoder = Encoder::new(&tokenizer, OPTIONS).unwrap().after_answers(count);
            encoder.encode_whole(&turns).map(|example| shown(&tokenizer, &example)).unwrap()
        };
        let (open, close) = ("<|im_start|>assistant\n", "<|im_end|>");
        let user = |text: &str| format!("<|im_start|>user\n{text}{close}\n");
        let expected = format!("{}{open}a{close}\n{}{open}«b{close}»", user("u"), user("v"));
        assert_eq!(given(1), expected);
        assert_eq!(given(0).replace(['«', '»'], ""), expected.replace(['«', '»'], ""));
        assert!(given(0).contains("«a"), "{}", given(0));
    }

    #[test]
    fn long_rows_are_cut_dropped_or_refused() {
        let tokenizer = tokenizer();
        let encode = |text: RowText, max_length, overlong| {
            Encoder::new(&tokenizer, EncodeOptions { max_length, overlong, ..OPTIONS }).unwrap().encode(&row(text))
        };
        let pair = || RowText::PromptCompletion { prompt: "xyz".into(), completion: "xyz".into() };
        let Ok(Encoded::Kept { example, cut, .. }) = encode(pair(), 8, Overlong::Error) else { panic!("8 tokens fit") };
        assert_eq!((cut, example.ids.len(), example.trained_tokens()), (0, 8, 4));
        let Ok(Encoded::Kept { example, cut, .. }) = encode(pair(), 6, Overlong::Truncate) else {
            panic!("a target is left")
        };
        assert_eq!((cut, example.ids.len(), example.trained_tokens()), (2, 6, 2));
        assert_eq!(encode(pair(), 4, Overlong::Truncate).unwrap(), Encoded::Dropped(Dropped::CutAway));
        assert_eq!(encode(pair(), 7, Overlong::Drop).unwrap(), Encoded::Dropped(Dropped::TooLong));
        let error = encode(pair(), 7, Overlong::Error).unwrap_err().to_string();
        assert!(error.contains("8 tokens, data.max_length is 7"), "{error}");
    }

    #[test]
    fn an_encoder_reads_the_prompt_and_the_answer_is_trained_whole() {
        let tokenizer = tokenizer();
        let options = EncodeOptions { has_encoder: true, max_length: 6, ..OPTIONS };
        let encoder = Encoder::new(&tokenizer, options).unwrap();
        let pair = |prompt: &str, completion: &str| {
            row(RowText::PromptCompletion { prompt: prompt.into(), completion: completion.into() })
        };
        let example = encoder.encode_whole(&pair("xy", "z")).unwrap();
        let shown = |ids: &[u32]| tokenizer.decode(ids, false);
        assert_eq!((shown(&example.source), shown(&example.ids)), ("<s>xy</s>".to_owned(), "<s>z</s>".to_owned()));
        assert_eq!((example.trained_tokens(), example.longest(), example.tokens()), (3, 4, 7));
        let pieces = decoded_sample(&tokenizer, &example);
        assert_eq!(pieces, [("<s>xy</s>\n".to_owned(), false), ("<s>z</s>".to_owned(), true)]);
        // The same of an instruction, and of a conversation of one question.
        let instruction = RowText::Instruction { instruction: "xy".into(), input: String::new(), output: "z".into() };
        assert_eq!(encoder.encode_whole(&row(instruction)).unwrap(), example);
        assert_eq!(encoder.encode_whole(&chat(&[("user", "xy"), ("assistant", "z")])).unwrap(), example);
        // A source that is cut keeps its end.
        let Encoded::Kept { example, cut, .. } = encoder.encode(&pair("xyzxyz", "xyzxyz")).unwrap() else {
            panic!("kept")
        };
        assert_eq!((shown(&example.source), shown(&example.ids), cut), ("<s>xyzx</s>".into(), "<s>xyzxy".into(), 4));
        let refused = |row: &Row| encoder.encode(row).unwrap_err().to_string();
        assert!(refused(&row(RowText::Text("x".into()))).contains("answers nothing"));
        let turns = [("user", "x"), ("assistant", "y"), ("user", "z"), ("assistant", "x")];
        assert!(refused(&chat(&turns)).contains("one question and its answer"));
        let on_prompt = EncodeOptions { train_on_prompt: true, ..options };
        assert!(Encoder::new(&tokenizer, on_prompt).is_err());
    }

    #[test]
    fn what_could_not_be_learnt_is_refused() {
        let chatml = tokenizer();
        let question = chat(&[("system", "s"), ("user", "u")]);
        assert!(error(&chatml, &question).contains("its roles are \"system\", \"user\""));
        let turns = chat(&[("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]);
        assert!(error(&tokenizer_with(None), &turns).contains("no chat template"));
        let endless = CHATML.replace("<|im_end|>", "");
        let found = error(&tokenizer_with(Some(&endless)), &turns);
        assert!(found.contains("assistant's turn 2 with \"a\\n\"") && found.contains("\"</s>\""), "{found}");
        // The system's words go into the last turn, wherever that is.
        let wandering = "{% for m in messages %}{% if loop.last %}[now]{% endif %}{{ m.content }}</s>{% endfor %}";
        let found = error(&tokenizer_with(Some(wandering)), &turns);
        assert!(found.contains("message 2") && found.contains("[now]"), "{found}");
        let opened =
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}A:{% endif %}";
        let found = error(&tokenizer_with(Some(opened)), &turns);
        assert!(found.contains("message 2") && found.contains("\"A:\"") && found.contains("\"a</s>\""), "{found}");
    }
}
