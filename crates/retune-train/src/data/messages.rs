//! Conversations as files have them: roles and keys of many programs, as the messages that chat templates know.
//!
//! Every key of a message is read, known to be without effect, or noted: see [`Found`].

use std::collections::BTreeSet;

use retune_text::chat_template::Message;
use serde_json::{Map, Value, json};

use super::json::{keys, list_in_text};
use crate::error::{describe, nearest};

/// What the reading of a row came upon beside what it reads.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Keys of messages that nothing reads.
    pub keys: BTreeSet<String>,
    /// Roles that are none of the usual ones.
    pub roles: BTreeSet<String>,
    /// Something that would be learnt otherwise if it were read, and why.
    pub changes: Option<(String, &'static str)>,
}

/// What is wrong with a value, to be said with its row: where it stands, what it is, and what was expected.
#[derive(Debug)]
pub(super) struct Wrong {
    pub place: String,
    pub found: String,
    pub expected: &'static str,
}

impl Wrong {
    pub fn new(place: impl Into<String>, found: &Value, expected: &'static str) -> Wrong {
        Wrong { place: place.into(), found: describe(found), expected }
    }
}

const TEXT: &str = "a text, in quotation marks";
const LIST: &str = "a list of at least one {\"role\": …, \"content\": …}";

/// The roles that templates know, and what other programs call them.
const ROLES: [(&str, &[&str]); 7] = [
    ("user", &["user", "human", "prompter"]),
    (
        "assistant",
        &["assistant", "gpt", "bot", "model", "chatgpt", "chatbot", "ai", "bing", "bard", "function_call", "tool_call"],
    ),
    ("system", &["system"]),
    ("developer", &["developer"]),
    ("tool", &["tool", "observation", "tool_response", "function_response", "tool_result"]),
    ("function", &["function"]),
    ("ipython", &["ipython"]),
];

/// Keys that templates know.
const FOR_TEMPLATES: [&str; 11] = [
    "tool_calls",
    "tool_call_id",
    "function_call",
    "name",
    "reasoning_content",
    "reasoning",
    "thinking",
    "tool_plan",
    "channel",
    "recipient",
    "citations",
];
/// Keys that say whether a turn is learnt.
const TRAINED: [&str; 5] = ["train", "training", "trainable", "weight", "loss"];
/// Keys without effect on what is learnt.
const WITHOUT_EFFECT: [&str; 11] =
    ["id", "idx", "index", "message_id", "parent_id", "timestamp", "created_at", "date", "lang", "language", "refusal"];

/// The turns in the value of a column, a list or the JSON text of one.
pub(super) fn messages(place: &str, value: &Value, found: &mut Found) -> Result<Vec<Message>, Wrong> {
    let decoded;
    let value = match value.as_str() {
        None => value,
        Some(text) => match list_in_text(text) {
            Some(list) => {
                decoded = list;
                &decoded
            }
            None if text.trim_start().starts_with('[') => {
                let expected = "JSON, as json.dumps writes it (Python's own notation with ' is none)";
                return Err(Wrong::new(place, value, expected));
            }
            None => value,
        },
    };
    let list = value.as_array().filter(|list| !list.is_empty()).ok_or_else(|| Wrong::new(place, value, LIST))?;
    let turns = list.iter().enumerate().filter(|(_, message)| !message.is_null());
    turns.map(|(at, turn)| message(&format!("{place}[{at}]"), turn, found)).collect()
}

/// Whether a value says something: not nothing, and no empty text, list or object.
pub(super) fn says_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    }
}

fn message(place: &str, value: &Value, found: &mut Found) -> Result<Message, Wrong> {
    let decoded = value.as_str().and_then(list_in_text);
    let Some(fields) = decoded.as_ref().unwrap_or(value).as_object() else {
        return Err(Wrong::new(place, value, "an object with the keys \"role\" and \"content\""));
    };
    let first = |names: [&'static str; 2]| {
        names.into_iter().find(|name| fields.get(*name).is_some_and(|value| !value.is_null()))
    };
    let named = |names: [&'static str; 2]| first(names).unwrap_or(names[0]);
    let (role_key, content_key) = (named(["role", "from"]), named(["content", "value"]));
    let missing = |key: &str| Wrong {
        place: format!("{place}.{key}"),
        found: format!("missing (the message has {})", keys(fields)),
        expected: TEXT,
    };
    let said = match fields.get(role_key) {
        Some(Value::String(role)) => role.as_str(),
        Some(other) => return Err(Wrong::new(format!("{place}.{role_key}"), other, TEXT)),
        None => return Err(missing("role")),
    };
    let role = role(said, place, found);
    let mut turn = Message { content: None, ..Message::new(role, "") };
    for (key, value) in fields.iter().filter(|(_, value)| says_something(value)) {
        let key = key.as_str();
        if FOR_TEMPLATES.contains(&key) {
            turn.more.insert(key.to_owned(), value.clone());
        } else if TRAINED.contains(&key) {
            match is_trained(value) {
                Some(trained) if turn.is_answer() => turn.masked |= !trained,
                Some(true) if !matches!(key, "weight" | "loss") => {
                    found.changes.get_or_insert((
                        format!("{place}.{key}"),
                        "is true on a turn that is no answer, and only answers are trained",
                    ));
                }
                Some(_) => {}
                None => return Err(Wrong::new(format!("{place}.{key}"), value, "true, false, 0 or 1")),
            }
        } else if key != role_key && key != content_key && !WITHOUT_EFFECT.contains(&key) {
            found.keys.insert(key.to_owned());
        }
    }
    let calls = ["tool_calls", "function_call"].iter().any(|key| turn.more.contains_key(*key));
    turn.content = match fields.get(content_key) {
        Some(Value::Array(parts)) => Some(text_of_parts(&format!("{place}.{content_key}"), parts)?),
        Some(Value::String(text)) => Some(text.clone()),
        // A turn that calls a tool says nothing.
        None | Some(Value::Null) if calls => None,
        None => return Err(missing("content")),
        Some(other) => return Err(Wrong::new(format!("{place}.{content_key}"), other, TEXT)),
    };
    if matches!(said.to_ascii_lowercase().as_str(), "function_call" | "tool_call") {
        call_in_text(&mut turn, place)?;
    }
    Ok(turn)
}

/// The role that is meant.
fn role(said: &str, place: &str, found: &mut Found) -> String {
    let lower = said.trim().to_ascii_lowercase();
    if let Some((role, _)) = ROLES.iter().find(|(_, names)| names.contains(&lower.as_str())) {
        return (*role).to_owned();
    }
    found.roles.insert(said.to_owned());
    let nearest = nearest(&lower, ROLES.iter().map(|(role, _)| *role));
    if nearest.is_some_and(|(_, similarity)| similarity >= 0.7) {
        found.changes.get_or_insert((format!("{place}.role {said:?}"), "is no role, but nearly one"));
    }
    said.to_owned()
}

/// What a mark says of a turn: true, false, 1 or 0, or the text of one of these, as tables hold them.
fn is_trained(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(trained) => Some(*trained),
        Value::Number(number) => [(0.0, false), (1.0, true)]
            .iter()
            .find(|(known, _)| number.as_f64() == Some(*known))
            .map(|(_, trained)| *trained),
        Value::String(text) => match text.to_ascii_lowercase().as_str() {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// The text of a content in parts. Parts of another kind (images, sounds) are of a model that this is not.
fn text_of_parts(place: &str, parts: &[Value]) -> Result<String, Wrong> {
    let mut text = String::new();
    for (at, part) in parts.iter().enumerate().filter(|(_, part)| !part.is_null()) {
        let place = format!("{place}[{at}]");
        match part {
            Value::String(piece) => text.push_str(piece),
            Value::Object(fields) => {
                let kind = fields.get("type").and_then(Value::as_str).unwrap_or("text");
                let other = fields
                    .iter()
                    .find(|(key, value)| !matches!(key.as_str(), "type" | "text") && says_something(value));
                match fields.get("text").and_then(Value::as_str) {
                    Some(piece) if kind == "text" && other.is_none() => text.push_str(piece),
                    _ => {
                        return Err(Wrong::new(
                            place,
                            part,
                            "a part of the type \"text\": models here read text alone",
                        ));
                    }
                }
            }
            other => return Err(Wrong::new(place, other, "a part {\"type\": \"text\", \"text\": …}")),
        }
    }
    Ok(text)
}

/// A turn whose text is the JSON of a call, as ShareGPT's role `function_call` has it, made a turn that calls.
fn call_in_text(turn: &mut Message, place: &str) -> Result<(), Wrong> {
    if turn.more.contains_key("tool_calls") {
        return Ok(());
    }
    let text = turn.text().to_owned();
    let calls: Vec<Map<String, Value>> = match list_in_text(&text) {
        Some(Value::Object(call)) => vec![call],
        Some(Value::Array(list)) => list.into_iter().filter_map(|call| call.as_object().cloned()).collect(),
        _ => Vec::new(),
    };
    if calls.is_empty() || calls.iter().any(|call| !call.get("name").is_some_and(Value::is_string)) {
        let found = Value::String(text);
        return Err(Wrong::new(
            format!("{place}.content"),
            &found,
            "the JSON of a call: {\"name\": …, \"arguments\": {…}}",
        ));
    }
    let calls = calls.into_iter().map(|call| json!({ "type": "function", "function": call }));
    turn.more.insert("tool_calls".to_owned(), calls.collect());
    turn.content = None;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> (Result<Vec<Message>, Wrong>, Found) {
        let mut found = Found::default();
        (messages("messages", &value, &mut found), found)
    }

    fn one(value: Value) -> Message {
        read(json!([value])).0.unwrap().remove(0)
    }

    #[test]
    fn roles_of_other_programs_are_the_same_roles() {
        for (said, role) in [
            ("human", "user"),
            ("GPT", "assistant"),
            ("model", "assistant"),
            ("observation", "tool"),
            ("developer", "developer"),
        ] {
            assert_eq!(one(json!({"from": said, "value": "x"})), Message::new(role, "x"), "{said}");
        }
        let (turns, found) = read(json!([{"role": "narrator", "content": "x"}]));
        assert_eq!(
            (turns.unwrap()[0].role.as_str(), found.roles.first().map(String::as_str)),
            ("narrator", Some("narrator"))
        );
        assert!(found.changes.is_none());
        assert!(read(json!([{"role": "asistant", "content": "x"}])).1.changes.is_some(), "nearly a role");
    }

    #[test]
    fn marks_decide_what_is_learnt() {
        for (key, value, masked) in [
            ("train", json!(false), true),
            ("training", json!(true), false),
            ("trainable", json!("false"), true),
            ("weight", json!(0), true),
            ("weight", json!(1.0), false),
            ("loss", json!(false), true),
        ] {
            assert_eq!(one(json!({"role": "assistant", "content": "x", key: value})).masked, masked, "{key}: {value}");
        }
        assert!(!one(json!({"role": "user", "content": "x", "train": false})).masked);
        assert!(read(json!([{"role": "user", "content": "x", "train": true}])).1.changes.is_some());
        assert!(read(json!([{"role": "user", "content": "x", "weight": 1}])).1.changes.is_none());
        assert_eq!(
            read(json!([{"role": "assistant", "content": "x", "weight": 0.5}])).0.unwrap_err().place,
            "messages[0].weight"
        );
    }

    #[test]
    fn what_templates_know_reaches_them_and_the_rest_is_noted() {
        let (turns, found) = read(
            json!([{"role": "assistant", "content": "x", "reasoning_content": "r", "tool_calls": [], "id": 3, "mood": "good"}]),
        );
        let turn = turns.unwrap().remove(0);
        assert_eq!(Value::Object(turn.more), json!({"reasoning_content": "r"}));
        assert_eq!(found.keys.into_iter().collect::<Vec<_>>(), ["mood"]);
        let call = json!([{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]);
        let turn = one(json!({"role": "assistant", "content": null, "tool_calls": call}));
        assert_eq!((turn.content, &turn.more["tool_calls"]), (None, &call));
        assert_eq!(
            one(json!({"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"a\": 1}}"})).more["tool_calls"],
            call
        );
        assert!(read(json!([{"from": "function_call", "value": "look it up"}])).0.is_err());
    }

    #[test]
    fn contents_in_parts_are_their_text() {
        let parts = json!([{"type": "text", "text": "a", "image_url": null}, null, {"type": "text", "text": "b"}]);
        assert_eq!(one(json!({"role": "user", "content": parts})).text(), "ab");
        let image = json!([{"type": "image", "text": null}]);
        let wrong = read(json!([{"role": "user", "content": image}])).0.unwrap_err();
        assert_eq!(wrong.place, "messages[0].content[0]");
        assert!(wrong.expected.contains("text alone"));
    }

    #[test]
    fn the_text_of_a_list_is_the_list() {
        let text = json!("[{\"role\": \"user\", \"content\": \"x\"}]");
        assert_eq!(read(text).0.unwrap(), [Message::new("user", "x")]);
        assert!(read(json!("[{'role': 'user', 'content': 'x'}]")).0.unwrap_err().expected.contains("json.dumps"));
        assert!(read(json!("hello")).0.unwrap_err().found.contains("hello"));
    }
}
