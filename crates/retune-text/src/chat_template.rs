//! Chat templates: the Jinja source that a model carries, rendered the way transformers renders it.
//!
//! The same whitespace rules (`trim_blocks`, `lstrip_blocks`), Python's string and dict methods, `raise_exception`, the tests
//! `iterable`, `sequence` and `number` of Jinja2, and a `tojson` that writes what Python's `json.dumps` writes. `strftime_now`
//! is another matter: a template that prints today's date makes every day's training data different. A template that asks
//! whether the function is defined has a fixed date to fall back to, and is told no until a date is given.

use std::collections::BTreeMap;
use std::io::{self, Write};

use minijinja::value::{Kwargs, Rest, StringInput, Value, ValueKind};
use minijinja::{Environment, ErrorKind, State, filters};
use serde::{Deserialize, Serialize};
use serde_json::Map;
use sha2::{Digest, Sha256};

use crate::date::Date;
use crate::error::Error;

const NAME: &str = "chat_template";
/// Instructions that the engine may run for one text. A conversation of a thousand turns takes some ten thousands; as many as this
/// take about a second, so that nested loops over long ranges come to an end.
const MOST_STEPS: u64 = 20_000_000;
/// Bytes that a template may print for one conversation.
const MOST_BYTES: usize = 64 << 20;
/// Lines of a template, bytes of a line, and operators in one tag: more than any real one has, and within what the engine is known to take.
const MOST_LINES: usize = 20_000;
const MOST_LINE_BYTES: usize = 50_000;
const MOST_OPERATORS: usize = 500;
/// How far a template may indent or pad.
const MOST_PADDING: usize = 9999;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or whatever else the template knows.
    pub role: String,
    /// None where a turn says nothing itself, as one that only calls tools.
    #[serde(default)]
    pub content: Option<String>,
    /// What else the template is told of the turn, under the names that templates have for it: `tool_calls`, `reasoning_content`.
    #[serde(flatten)]
    pub more: Map<String, serde_json::Value>,
    /// Whether the turn is not to be learnt although it is an answer. Templates are not told.
    #[serde(skip)]
    pub masked: bool,
}

impl Message {
    /// A turn that is its text alone.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: Some(content.into()), more: Map::new(), masked: false }
    }

    /// Whether the assistant speaks.
    pub fn is_answer(&self) -> bool {
        self.role == "assistant"
    }

    /// What the turn says, empty where it says nothing itself.
    pub fn text(&self) -> &str {
        self.content.as_deref().unwrap_or_default()
    }
}

/// A conversation, and what a template is handed beside its turns.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Conversation {
    pub messages: Vec<Message>,
    /// Further variables of the template: `tools`, and those that a template has of its own.
    pub variables: Map<String, serde_json::Value>,
}

impl Conversation {
    /// The assistant's turns.
    pub fn answers(&self) -> impl DoubleEndedIterator<Item = &Message> {
        self.messages.iter().filter(|message| message.is_answer())
    }
}

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Self {
        Conversation { messages, variables: Map::new() }
    }
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    bos_token: String,
    eos_token: String,
    environment: Environment<'static>,
    date: Option<Date>,
}

impl ChatTemplate {
    /// Compiles `source`; `bos_token` and `eos_token` are the texts the template may print, empty for a model without them.
    ///
    /// # Errors
    /// A template that is not valid Jinja, with the line.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<ChatTemplate, Error> {
        let is_long = |(at, line): &(usize, &str)| *at >= MOST_LINES || line.len() > MOST_LINE_BYTES;
        if let Some((at, _)) = source.split('\n').enumerate().find(is_long) {
            let cause = format!("more than {MOST_LINES} lines, or than {MOST_LINE_BYTES} bytes in one");
            return Err(Error::ChatTemplateSyntax { line: at + 1, cause });
        }
        if let Some(line) = overlong_tag(source) {
            let cause = format!("a tag with more than {MOST_OPERATORS} operators");
            return Err(Error::ChatTemplateSyntax { line, cause });
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(MOST_STEPS));
        environment.set_unknown_method_callback(method);
        environment.add_filter("format", format);
        environment.add_filter("indent", indent);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", tojson);
        // minijinja's own answer otherwise for none, texts, mappings and booleans.
        environment.add_test("iterable", |value: &Value| is_sequence(value) || value.kind() == ValueKind::Iterable);
        environment.add_test("sequence", is_sequence);
        environment.add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
        environment
            .add_template_owned(NAME, replace_generation_tags(source))
            .map_err(|error| Error::ChatTemplateSyntax { line: error.line().unwrap_or(0), cause: cause(&error) })?;
        let mut template = ChatTemplate {
            source: source.to_owned(),
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
            environment,
            date: None,
        };
        if template.prints_today() {
            template.define_strftime_now(Date::today());
        }
        Ok(template)
    }

    /// The same template on a given day: `strftime_now` is defined and tells that day.
    pub fn with_date(mut self, date: Date) -> ChatTemplate {
        self.date = Some(date);
        self.define_strftime_now(date);
        self
    }

    /// Whether the same conversation is another text tomorrow: the template calls `strftime_now` without asking whether it is
    /// defined, and no date is given.
    pub fn prints_today(&self) -> bool {
        self.date.is_none() && self.source.contains("strftime_now") && !self.source.contains("strftime_now is ")
    }

    fn define_strftime_now(&mut self, date: Date) {
        self.environment.add_function("strftime_now", move |format: String| {
            date.strftime(&format).map_err(|directive| {
                let cause = format!("strftime_now does not know {directive}");
                minijinja::Error::new(ErrorKind::InvalidOperation, cause)
            })
        });
    }

    /// The turns as the text the model was trained on, with no variables beside them. `add_generation_prompt` opens the
    /// assistant's next turn.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_with`].
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, Error> {
        self.render_with(messages, &Map::new(), add_generation_prompt)
    }

    /// The turns, with further variables of a [`Conversation`], as the text the model was trained on.
    ///
    /// # Errors
    /// What the template itself raises (roles that do not alternate, say), what it cannot evaluate, and loops without end.
    pub fn render_with(
        &self,
        messages: &[Message],
        variables: &Map<String, serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let own = [
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("messages", Value::from_serialize(messages)),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("bos_token", Value::from(self.bos_token.as_str())),
            ("eos_token", Value::from(self.eos_token.as_str())),
        ];
        let mut context: BTreeMap<&str, Value> = own.into_iter().collect();
        context.extend(variables.iter().map(|(name, value)| (name.as_str(), Value::from_serialize(value))));
        let mut text = Printed(Vec::new());
        let template = self.environment.get_template(NAME);
        let rendered = template.and_then(|template| template.render_captured_to(&context, &mut text).map(drop));
        rendered
            .map_err(|error| Error::ChatTemplateRender { line: error.line().unwrap_or(0), cause: cause(&error) })?;
        Ok(String::from_utf8_lossy(&text.0).into_owned())
    }

    /// The template as the model carries it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// SHA-256 of the source, in hexadecimal.
    pub fn hash(&self) -> String {
        format!("{:x}", Sha256::digest(self.source.as_bytes()))
    }
}

/// What a template has printed.
struct Printed(Vec<u8>);

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MOST_BYTES - self.0.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn cause(error: &minijinja::Error) -> String {
    match error.detail() {
        _ if error.kind() == ErrorKind::WriteFailure => {
            format!("the template printed too much and was stopped after {MOST_BYTES} bytes")
        }
        _ if error.kind() == ErrorKind::OutOfFuel => {
            format!("the template ran too long and was stopped after {MOST_STEPS} steps")
        }
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// The line on which a tag with too many operators begins.
fn overlong_tag(source: &str) -> Option<usize> {
    let bytes = source.as_bytes();
    let is_tag = |at: &usize| bytes[*at] == b'{' && matches!(bytes.get(at + 1), Some(b'{' | b'%'));
    let mut at = 0;
    while let Some(start) = (at..bytes.len()).find(is_tag) {
        let (mut quote, mut word, mut operators) = (None, start + 2, 0);
        at = start + 2;
        while at < bytes.len() {
            let byte = bytes[at];
            match quote {
                Some(_) if byte == b'\\' => at += 1,
                Some(open) if byte == open => quote = None,
                Some(_) => {}
                None if byte == b'"' || byte == b'\'' => quote = Some(byte),
                None if b"%}".contains(&byte) && bytes.get(at + 1) == Some(&b'}') => break,
                None if byte.is_ascii_alphanumeric() || byte == b'_' => {}
                None => {
                    let is_word =
                        [&b"not"[..], b"and", b"or", b"if", b"else", b"is", b"in"].contains(&&bytes[word..at]);
                    let is_sign = !byte.is_ascii_whitespace() && !b",:)]}".contains(&byte);
                    operators += usize::from(is_word) + usize::from(is_sign);
                    word = at + 1;
                }
            }
            at += 1;
        }
        if operators > MOST_OPERATORS {
            return Some(source[..start].matches('\n').count() + 1);
        }
    }
    None
}

/// Python's methods of texts and mappings.
fn method(state: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, minijinja::Error> {
    if method == "format" {
        check_padding(value)?;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

fn format(state: &State, text: &Value, args: Rest<Value>) -> Result<Value, minijinja::Error> {
    check_padding(text)?;
    filters::format(state, text, args)
}

fn indent(
    text: StringInput<'_>,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<Value, minijinja::Error> {
    let named = if options.has("width") { options.peek("width")? } else { None };
    check_width(width.or(named).unwrap_or(0))?;
    filters::indent(text, width, first, blank, options)
}

/// Refuses a text to be filled in that pads further than it may: it says so by a number right after a `%`, or behind the colon within braces.
fn check_padding(text: &Value) -> Result<(), minijinja::Error> {
    let Some(text) = text.as_str() else { return Ok(()) };
    let ends = |c: char| !c.is_ascii_digit() && !"#+-. ".contains(c);
    let percent = text.split('%').skip(1).map(|field| field.split(ends).next().unwrap_or_default());
    let braces = text.split('{').skip(1).filter_map(|field| field.split('}').next()?.split_once(':'));
    let mut widths = percent.chain(braces.map(|(_, spec)| spec)).map(|spec| {
        let runs = spec.split(|c: char| !c.is_ascii_digit()).filter(|run| !run.is_empty());
        runs.map(|run| run.parse().unwrap_or(usize::MAX)).max().unwrap_or(0)
    });
    widths.try_for_each(check_width)
}

fn check_width(width: usize) -> Result<(), minijinja::Error> {
    if width <= MOST_PADDING {
        return Ok(());
    }
    let cause = format!("a width of {width}, expected at most {MOST_PADDING}");
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, cause))
}

/// What Python can index and knows the length of. An undefined value has the length 0 there.
fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Bytes | ValueKind::Undefined
    )
}

/// transformers marks the assistant's words with `{% generation %}`, which is not Jinja. It prints nothing; a block that is
/// always entered stands in for it and leaves the whitespace control of the tags as it was.
fn replace_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        match generation_tag(tag) {
            Some((replacement, after)) => {
                out.push_str(&replacement);
                rest = after;
            }
            None => {
                out.push_str("{%");
                rest = &tag["{%".len()..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// What replaces the tag that `text` starts with, and the text after it; `None` for any other tag.
fn generation_tag(text: &str) -> Option<(String, &str)> {
    let (inner, after) = text.strip_prefix("{%")?.split_once("%}")?;
    let trimmed = inner.trim_start_matches(['-', '+']);
    let open = &inner[..inner.len() - trimmed.len()];
    let word = trimmed.trim_end_matches(['-', '+']);
    let close = &trimmed[word.len()..];
    let statement = match word.trim() {
        "generation" => "if true",
        "endgeneration" => "endif",
        _ => return None,
    };
    Some((format!("{{%{open} {statement} {close}%}}"), after))
}

/// `json.dumps` as transformers calls it: nothing escaped for HTML, `ensure_ascii` off unless asked for.
fn tojson(value: Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    check_width(indent.unwrap_or(0))?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let value = serde_json::to_value(&value)
        .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let style =
        JsonStyle { indent, ensure_ascii: ensure_ascii.unwrap_or(false), sort_keys: sort_keys.unwrap_or(false) };
    let mut out = String::new();
    style.write(&value, 0, &mut out);
    Ok(Value::from_safe_string(out))
}

/// Python's way of writing JSON: `", "` and `": "` between things on one line, which serde_json has no setting for.
struct JsonStyle {
    indent: Option<usize>,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl JsonStyle {
    fn write(&self, value: &serde_json::Value, depth: usize, out: &mut String) {
        match value {
            serde_json::Value::Array(items) if !items.is_empty() => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.separate(i, depth + 1, out);
                    self.write(item, depth + 1, out);
                }
                self.new_line(depth, out);
                out.push(']');
            }
            serde_json::Value::Object(map) if !map.is_empty() => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                out.push('{');
                for (i, (key, item)) in entries.into_iter().enumerate() {
                    self.separate(i, depth + 1, out);
                    self.write_scalar(&serde_json::Value::from(key.as_str()), out);
                    out.push_str(": ");
                    self.write(item, depth + 1, out);
                }
                self.new_line(depth, out);
                out.push('}');
            }
            scalar_or_empty => self.write_scalar(scalar_or_empty, out),
        }
    }

    fn write_scalar(&self, value: &serde_json::Value, out: &mut String) {
        let text = value.to_string();
        if !self.ensure_ascii {
            out.push_str(&text);
            return;
        }
        for c in text.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }

    fn separate(&self, index: usize, depth: usize, out: &mut String) {
        if index > 0 {
            out.push_str(if self.indent.is_some() { "," } else { ", " });
        }
        self.new_line(depth, out);
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SmolLM2's template.
    const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn message(role: &str, content: &str) -> Message {
        Message::new(role, content)
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, Error> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(messages, false)
    }

    fn render_one(source: &str) -> String {
        render(source, &[message("user", " é <b> ")]).unwrap()
    }

    #[test]
    fn a_default_system_turn_is_added_only_where_none_is_given() {
        let template = ChatTemplate::new(SMOLLM2, "", "").unwrap();
        let text = template.render(&[message("user", "hi")], true).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
             <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        );
        let text = template.render(&[message("system", "be brief"), message("user", "hi")], false).unwrap();
        assert_eq!(text, "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n");
    }

    #[test]
    fn blocks_take_the_newline_after_and_the_indentation_before_them() {
        let source = "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}\nend\n";
        assert_eq!(render_one(source), "user\nend");
    }

    #[test]
    fn python_methods_slices_and_loop_controls_work() {
        assert_eq!(render_one("{{ messages[0].content.strip() }}|{{ messages[0]['content'] | trim }}"), "é <b>|é <b>");
        assert_eq!(render_one("{% if messages[0].get('name') is none %}none{% endif %}"), "none");
        assert_eq!(render_one("{{ messages[1:] | length }}{{ messages[0].role.startswith('us') }}"), "0True");
        assert_eq!(render_one("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"), "01");
        assert_eq!(
            render_one("{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = 5 %}{% endfor %}{{ ns.n }}"),
            "5"
        );
    }

    #[test]
    fn the_models_tokens_are_known_and_tools_are_none() {
        assert_eq!(
            render_one("{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ unknown is defined }}"),
            "<s></s>TrueFalse"
        );
    }

    #[test]
    fn what_a_row_has_beside_its_turns_reaches_the_template() {
        let turn = Message {
            content: None,
            more: serde_json::from_str(
                r#"{"tool_calls": [{"function": {"name": "f", "arguments": {"b": 1, "a": 2}}}]}"#,
            )
            .unwrap(),
            ..message("assistant", "")
        };
        let variables = serde_json::from_str(r#"{"tools": [{"name": "f"}], "thinking_mode": "off"}"#).unwrap();
        let render = |source: &str| {
            let template = ChatTemplate::new(source, "", "").unwrap();
            template.render_with(std::slice::from_ref(&turn), &variables, false).unwrap()
        };
        assert_eq!(render("{{ tools | tojson }} {{ thinking_mode }}"), r#"[{"name": "f"}] off"#);
        let call = "{{ messages[0].content is none }} {{ messages[0].tool_calls[0].function.arguments | tojson }}";
        assert_eq!(render(call), r#"True {"b": 1, "a": 2}"#);
        assert_eq!(
            render_one("{{ messages[0].tool_calls is defined }}{{ messages[0].masked is defined }}"),
            "FalseFalse"
        );
    }

    #[test]
    fn a_template_that_can_do_without_the_date_of_today_does() {
        let source = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}";
        let template = ChatTemplate::new(source, "", "").unwrap();
        assert_eq!(template.render(&[], false).unwrap(), "26 Jul 2024");
        assert!(!template.prints_today());
        let dated = template.with_date("2025-03-01".parse().unwrap());
        assert_eq!(dated.render(&[], false).unwrap(), "01 Mar 2025");
    }

    #[test]
    fn a_template_that_needs_a_date_gets_the_one_given_or_todays() {
        let template = ChatTemplate::new("{{ strftime_now('%Y-%m-%d') }}", "", "").unwrap();
        assert!(template.prints_today());
        let printed = template.render(&[], false).unwrap();
        assert!(printed.parse::<Date>().is_ok(), "{printed}");
        let dated = template.with_date("2025-03-01".parse().unwrap());
        assert!(!dated.prints_today());
        assert_eq!(dated.render(&[], false).unwrap(), "2025-03-01");
        let error = render("{{ strftime_now('%Q') }}", &[]).unwrap_err().to_string();
        assert!(error.contains("%Q"), "{error}");
    }

    #[test]
    fn tests_of_kinds_answer_as_jinja2_does() {
        let kinds = ["none", "'x'", "{}", "[]", "1", "true", "unknown", "range(2)", "(1, 2)"];
        let answers = |test: &str| -> String {
            kinds.map(|kind| render_one(&format!("{{{{ ({kind}) is {test} }}}}")).remove(0)).iter().collect()
        };
        assert_eq!(answers("iterable"), "FTTTFFTTT");
        assert_eq!(answers("sequence"), "FTTTFFTFT");
        assert_eq!(answers("number"), "FFFFTTFFF");
        assert_eq!(render_one("{% if tools is iterable and tools | length > 0 %}t{% else %}no{% endif %}"), "no");
    }

    #[test]
    fn tojson_writes_what_python_writes() {
        assert_eq!(render_one("{{ messages | tojson }}"), r#"[{"role": "user", "content": " é <b> "}]"#);
        assert_eq!(render_one("{{ {'b': [1, none, true], 'a': {}} | tojson }}"), r#"{"b": [1, null, true], "a": {}}"#);
        assert_eq!(render_one("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}"), r#"{"a": 2, "b": 1}"#);
        assert_eq!(
            render_one("{{ {'a': [1, 2], 'b': []} | tojson(indent=2) }}"),
            "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": []\n}"
        );
        assert_eq!(render_one("{{ 'é🦀' | tojson(ensure_ascii=true) }}"), r#""\u00e9\ud83e\udd80""#);
    }

    #[test]
    fn generation_tags_print_nothing_and_keep_their_whitespace_control() {
        assert_eq!(render_one("a {%- generation -%} b {%- endgeneration %} c"), "ab c");
        assert_eq!(render_one("{% generation %}{{ messages[0].role }}{% endgeneration %}"), "user");
        assert_eq!(render_one("{{ '{%' }}generation"), "{%generation");
    }

    #[test]
    fn a_bad_template_names_its_line() {
        let Err(Error::ChatTemplateSyntax { line, .. }) = ChatTemplate::new("a\n{% if %}", "", "") else {
            panic!("compiled");
        };
        assert_eq!(line, 2);
        for hostile in ["{%", "{%}", "{{", "{% generation", "{%-%}", "{% endgeneration %}", "{%+-%}"] {
            assert!(ChatTemplate::new(hostile, "", "").is_err(), "{hostile}");
        }
    }

    #[test]
    fn what_a_template_raises_reaches_the_user_with_its_line() {
        let error = render("\n{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
        assert!(matches!(error, Error::ChatTemplateRender { line: 2, .. }), "{error:?}");
        assert!(error.to_string().contains("roles must alternate"));
        assert!(render("{{ messages[0]['role'] }}", &[]).is_err());
    }

    #[test]
    fn a_template_that_hardly_ends_is_stopped_and_a_long_chat_is_not() {
        let nested = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}\
            {% endfor %}{% endfor %}{% endfor %}";
        let error = render(nested, &[]).unwrap_err();
        assert!(matches!(error, Error::ChatTemplateRender { .. }), "{error:?}");
        assert!(error.to_string().contains("ran too long"), "{error}");
        let turns: Vec<Message> = (0..1000).map(|n| message(["user", "assistant"][n % 2], "some words")).collect();
        assert!(render(SMOLLM2, &turns).unwrap().ends_with("assistant\nsome words<|im_end|>\n"));
        // Every turn may look at all the others.
        let square = "{% for m in messages %}{% for n in messages %}{% if m == n %}{% endif %}{% endfor %}{% endfor %}";
        assert_eq!(render(square, &turns).unwrap(), "");
    }

    #[test]
    fn long_lines_and_many_lines_are_refused() {
        for source in ["a".repeat(MOST_LINE_BYTES + 1), "\n".repeat(MOST_LINES)] {
            let error = ChatTemplate::new(&source, "", "").unwrap_err().to_string();
            assert!(error.contains("more than 20000 lines"), "{error}");
        }
    }

    #[test]
    fn tags_of_more_operators_than_any_real_one_has_are_refused() {
        for (operator, last) in
            [("- ", "1"), ("1 + ", "1"), ("a ~ ", "a"), ("1 if a else ", "1"), ("a | f | ", "f"), ("a.", "a")]
        {
            for tag in [("{{ ", " }}"), ("{% set x = ", " %}")] {
                let source = |count: usize| format!("\n{}{}{last}{}", tag.0, operator.repeat(count), tag.1);
                let error = ChatTemplate::new(&source(MOST_OPERATORS + 1), "", "").unwrap_err().to_string();
                assert!(error.contains("line 2: a tag with more than 500 operators"), "{operator}: {error}");
                assert!(overlong_tag(&source(240)).is_none(), "{operator}");
            }
        }
        let text = "-".repeat(10_000);
        assert_eq!(render_one(&format!("{text}{{{{ '{text}' }}}}")).len(), 20_000);
    }

    #[test]
    fn what_a_template_prints_is_bounded() {
        let wide = ["{{ '%10000d' | format(1) }}", "{{ '{:>10000}'.format(1) }}", "{{ 'a\nb' | indent(10000) }}"];
        let wide = wide.into_iter().chain(["{{ 'a\nb' | indent(width=10000) }}", "{{ [1] | tojson(indent=10000) }}"]);
        for source in wide {
            let error = render(source, &[]).unwrap_err().to_string();
            assert!(error.contains("a width of 10000"), "{source}: {error}");
        }
        assert_eq!(
            render_one("{{ '%03d' | format(7) }}{{ '{:>4}'.format('a') }}{{ 'a\nb' | indent(2) }}"),
            "007   aa\n  b"
        );
        let endless = "{% for i in range(1000) %}{{ 'abcdefgh' * 100000 }}{% endfor %}";
        let error = render(endless, &[]).unwrap_err().to_string();
        assert!(error.contains("printed too much"), "{error}");
    }

    #[test]
    fn the_hash_is_of_the_source() {
        let hash = |source| ChatTemplate::new(source, "", "").unwrap().hash();
        assert_eq!(hash(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_ne!(hash("a"), hash("b"));
    }
}
