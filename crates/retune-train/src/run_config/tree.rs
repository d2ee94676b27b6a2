//! The configuration as a tree of values: parsing, overrides, and a check against the schema that names keys by their path.
//!
//! serde alone would say what is wrong but not where; here every complaint has the key's full path and the nearest valid one.

use serde_json::{Map, Value};

use super::synonyms::{self, Here};
use crate::error::{Error, describe, nearest, quoted};

/// Names that have less in common are not taken for each other.
const LEAST_SIMILAR: f64 = 0.5;

/// Parses YAML, of which JSON is a part; nothing but comments is null.
pub(crate) fn parse(text: &str, origin: &str) -> Result<Value, Error> {
    let is_empty = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
    if text.lines().all(is_empty) {
        return Ok(Value::Null);
    }
    // YAML 1.1's other booleans (yes, no, on, off, y, n) are texts here, as in YAML 1.2.
    let options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        // The usual form of these errors advises what to change in the program.
        let cause = error.render_with_formatter(&serde_saphyr::UserMessageFormatter);
        Error::Yaml { origin: origin.to_owned(), cause }
    })
}

/// Applies one `a.b.c=value`, the value being YAML. Sections that are not there are made.
pub(crate) fn set(root: &mut Value, text: &str) -> Result<(), Error> {
    let problem = |problem: &str| Error::Override { text: text.to_owned(), problem: problem.to_owned() };
    let (path, value) = text.split_once('=').ok_or_else(|| problem("has no `=`"))?;
    let value = parse(value, &format!("the value of the override {text:?}"))?;
    let mut node = root;
    for key in path.trim().split('.') {
        if key.is_empty() {
            return Err(problem("has an empty key"));
        }
        if node.is_null() {
            *node = Value::Object(Map::new());
        }
        let Some(section) = node.as_object_mut() else {
            return Err(problem(&format!("goes through {key:?}, but what is above it is a value and has no keys")));
        };
        node = section.entry(key).or_insert(Value::Null);
    }
    *node = value;
    Ok(())
}

/// A JSON schema as schemars writes it.
pub(crate) struct Schema<'a> {
    root: &'a Value,
}

impl<'a> Schema<'a> {
    pub(crate) fn new(root: &'a Value) -> Self {
        Schema { root }
    }

    /// Checks keys, types, enumerations and least values of the whole tree.
    pub(crate) fn check(&self, value: &Value) -> Result<(), Error> {
        self.check_at(value, self.root, "")
    }

    fn check_at(&self, value: &Value, schema: &'a Value, path: &str) -> Result<(), Error> {
        let schema = self.resolve(schema);
        if let Some(choices) = self.choices(schema) {
            return if choices.contains(&value) { Ok(()) } else { Err(not_among(value, &choices, path)) };
        }
        if let Some(branches) = branches(schema) {
            return self.check_branches(value, branches, path);
        }
        let types = self.types(schema);
        if !accepts(&types, value) {
            return Err(wrong_type(value, &types, path));
        }
        if let (Some(least), Some(number)) = (schema.get("minimum").and_then(Value::as_f64), value.as_f64())
            && number < least
        {
            let expected = format!("a number of at least {least}");
            return Err(Error::KeyValue {
                key: path.to_owned(),
                found: describe(value),
                expected,
                advice: advice(path),
            });
        }
        match value {
            Value::Object(map) => self.check_object(map, schema, path),
            Value::Array(items) => match schema.get("items") {
                Some(item) => items
                    .iter()
                    .enumerate()
                    .try_for_each(|(at, value)| self.check_at(value, item, &format!("{path}[{at}]"))),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// A value must fit one of the branches; if it fits none, what is wrong with the one for its type is told.
    fn check_branches(&self, value: &Value, branches: &'a [Value], path: &str) -> Result<(), Error> {
        let mut wrong = None;
        for branch in branches.iter().filter(|branch| accepts(&self.types(branch), value)) {
            match self.check_at(value, branch, path) {
                Ok(()) => return Ok(()),
                Err(error) => wrong = wrong.or(Some(error)),
            }
        }
        let types = || branches.iter().flat_map(|branch| self.types(branch)).collect::<Vec<_>>();
        Err(wrong.unwrap_or_else(|| wrong_type(value, &types(), path)))
    }

    fn check_object(&self, map: &Map<String, Value>, schema: &'a Value, path: &str) -> Result<(), Error> {
        let properties = schema.get("properties").and_then(Value::as_object);
        let others = schema.get("additionalProperties");
        for (key, value) in map {
            let path = join(path, key);
            if let Some(schema) = properties.and_then(|properties| properties.get(key)) {
                self.check_at(value, schema, &path)?;
            } else if let Some(schema) = others.filter(|others| others.is_object()) {
                self.check_at(value, schema, &path)?;
            } else if others == Some(&Value::Bool(false)) {
                return Err(self.unknown_key(&path, properties));
            }
        }
        for key in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
            if map.get(key).is_none_or(Value::is_null) {
                let meaning = properties.and_then(|properties| properties.get(key)).map(|schema| self.meaning(schema));
                return Err(Error::MissingKey {
                    key: join(path, key),
                    meaning: meaning.unwrap_or_default().to_owned(),
                });
            }
        }
        Ok(())
    }

    fn unknown_key(&self, path: &str, properties: Option<&Map<String, Value>>) -> Error {
        let known = self.all_keys();
        let (section, key) = path.rsplit_once('.').unwrap_or(("", path));
        // A key may be misspelt, or be right and in the wrong section.
        let similarity = |candidate: &str| {
            let last = candidate.rsplit_once('.').map_or(candidate, |(_, last)| last);
            let in_place = if join(section, last) == candidate { 0.2 } else { 0.0 };
            strsim::normalized_damerau_levenshtein(key, last) + in_place
        };
        let best = known.iter().map(|known| (known.as_str(), similarity(known)));
        let best = best.reduce(|best, next| if next.1 > best.1 { next } else { best });
        // What another program calls it says more than how it is spelt, unless it is a key of ours.
        let meant = match synonyms::here(key) {
            Some(Here::Key(here)) if known.iter().any(|known| known == here) => Some(here),
            Some(Here::Words(_)) => None,
            _ => best.filter(|best| best.1 >= LEAST_SIMILAR).map(|best| best.0),
        };
        let advice = match (meant, synonyms::here(key)) {
            (Some(meant), _) => format!("; did you mean {meant}?"),
            (None, Some(Here::Words(words))) => format!(": {words}."),
            (None, _) => ".".to_owned(),
        };
        Error::UnknownKey {
            key: path.to_owned(),
            advice,
            place: if section.is_empty() { "at the top".to_owned() } else { format!("of {section}") },
            known: quoted(properties.into_iter().flat_map(Map::keys).map(String::as_str)),
        }
    }

    /// The paths of all keys.
    pub(super) fn all_keys(&self) -> Vec<String> {
        let mut known = Vec::new();
        self.key_paths(self.root, "", &mut known);
        known
    }

    /// The paths of all keys below a place.
    fn key_paths(&self, schema: &'a Value, path: &str, found: &mut Vec<String>) {
        let schema = self.resolve(schema);
        for (key, schema) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
            let path = join(path, key);
            self.key_paths(schema, &path, found);
            found.push(path);
        }
        for branch in branches(schema).into_iter().flatten() {
            self.key_paths(branch, path, found);
        }
    }

    /// What a reference stands for.
    fn resolve(&self, mut schema: &'a Value) -> &'a Value {
        // References of references are followed, in a circle only so far.
        for _ in 0..8 {
            let pointer = schema.get("$ref").and_then(Value::as_str).and_then(|reference| reference.strip_prefix('#'));
            match pointer.and_then(|pointer| self.root.pointer(pointer)) {
                Some(target) => schema = target,
                None => break,
            }
        }
        schema
    }

    /// The values of an enumeration, which null may belong to; `None` for what is no enumeration.
    fn choices(&self, schema: &'a Value) -> Option<Vec<&'a Value>> {
        let schema = self.resolve(schema);
        if let Some(constant) = schema.get("const") {
            return Some(vec![constant]);
        }
        if let Some(values) = schema.get("enum").and_then(Value::as_array) {
            return Some(values.iter().collect());
        }
        if schema.get("type").and_then(Value::as_str) == Some("null") {
            return Some(vec![&Value::Null]);
        }
        let choices: Option<Vec<_>> = branches(schema)?.iter().map(|branch| self.choices(branch)).collect();
        choices.map(|choices| choices.concat())
    }

    /// The names of the types a value may have; empty where any will do.
    fn types(&self, schema: &'a Value) -> Vec<&'a str> {
        let schema = self.resolve(schema);
        if let Some(choices) = self.choices(schema) {
            return choices.into_iter().map(type_name).collect();
        }
        match schema.get("type") {
            Some(Value::String(name)) => vec![name.as_str()],
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            _ => branches(schema).into_iter().flatten().flat_map(|branch| self.types(branch)).collect(),
        }
    }

    /// The first paragraph of a key's description.
    fn meaning(&self, schema: &'a Value) -> &'a str {
        let description = schema.get("description").or_else(|| self.resolve(schema).get("description"));
        description.and_then(Value::as_str).and_then(|text| text.split("\n\n").next()).unwrap_or_default()
    }
}

fn branches(schema: &Value) -> Option<&[Value]> {
    schema.get("anyOf").or_else(|| schema.get("oneOf")).and_then(Value::as_array).map(Vec::as_slice)
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn accepts(types: &[&str], value: &Value) -> bool {
    let name = type_name(value);
    types.is_empty() || types.iter().any(|&accepted| accepted == name || (accepted == "number" && name == "integer"))
}

fn wrong_type(value: &Value, types: &[&str], path: &str) -> Error {
    let mut expected: Vec<&str> = Vec::new();
    for name in types {
        let words = match *name {
            "null" => continue,
            "boolean" => "true or false",
            "integer" => "a whole number",
            "number" => "a number",
            "string" => "a text",
            "array" => "a list",
            "object" => "a section with keys",
            other => other,
        };
        if !expected.contains(&words) {
            expected.push(words);
        }
    }
    Error::KeyValue { key: named(path), found: describe(value), expected: expected.join(" or "), advice: advice(path) }
}

fn not_among(value: &Value, choices: &[&Value], path: &str) -> Error {
    let choices = choices.iter().filter(|choice| !choice.is_null());
    let texts = || choices.clone().filter_map(|choice| choice.as_str());
    let advice = match value.as_str().and_then(|text| nearest(text, texts())) {
        Some((found, similarity)) if similarity > 0.4 => format!("Did you mean {found}?"),
        _ => advice(path),
    };
    let names: Vec<String> =
        choices.map(|choice| choice.as_str().map_or_else(|| choice.to_string(), str::to_owned)).collect();
    let expected = match names.as_slice() {
        [only] => only.clone(),
        names => format!("one of {}", names.join(", ")),
    };
    Error::KeyValue { key: named(path), found: describe(value), expected, advice }
}

fn advice(path: &str) -> String {
    if path.is_empty() {
        "Write keys and values".to_owned()
    } else {
        "Correct it, or remove the key for its default".to_owned()
    }
}

fn named(path: &str) -> String {
    if path.is_empty() { "the configuration".to_owned() } else { path.to_owned() }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn schema() -> Value {
        json!({
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": "What it is called.\n\nMore."},
                "count": {"type": ["integer", "null"], "minimum": 1},
                "kind": {"$ref": "#/$defs/Kind", "description": "The kind."},
                "section": {"anyOf": [{"$ref": "#/$defs/Section"}, {"type": "null"}]}
            },
            "additionalProperties": false,
            "required": ["name"],
            "$defs": {
                "Kind": {"oneOf": [{"type": "string", "enum": ["linear"]}, {"type": "string", "const": "cosine"}]},
                "Section": {
                    "type": "object",
                    "properties": {
                        "rate": {"type": "number"},
                        "modules": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
                        "ranks": {"type": "object", "additionalProperties": {"type": "integer"}},
                        "start": {"enum": [true, "gaussian"]}
                    },
                    "additionalProperties": false
                }
            }
        })
    }

    fn check(value: Value) -> Result<(), String> {
        let schema = schema();
        Schema::new(&schema).check(&value).map_err(|error| error.to_string())
    }

    fn error(value: Value) -> String {
        check(value).unwrap_err()
    }

    #[test]
    fn what_the_schema_allows_passes() {
        let section = json!({"rate": 1, "modules": ["a"], "ranks": {"x.y": 3}, "start": true});
        assert_eq!(check(json!({"name": "n", "count": null, "kind": "cosine", "section": section})), Ok(()));
        assert_eq!(check(json!({"name": "n", "count": 1, "section": null})), Ok(()));
        assert_eq!(check(json!({"name": "n", "section": {"modules": "a", "rate": 0.5, "start": "gaussian"}})), Ok(()));
    }

    #[test]
    fn unknown_keys_are_named_in_full_with_the_nearest() {
        let unknown = error(json!({"name": "n", "section": {"rte": 1}}));
        assert!(unknown.contains("unknown key section.rte; did you mean section.rate?"), "{unknown}");
        assert!(unknown.contains("Keys of section: \"rate\", \"modules\", \"ranks\", \"start\""), "{unknown}");
        assert!(error(json!({"name": "n", "modules": "a"})).contains("did you mean section.modules?"));
        assert!(error(json!({"nam": "n"})).contains("unknown key nam; did you mean name? Keys at the top"));
    }

    #[test]
    fn wrong_values_are_named_in_full() {
        assert_eq!(
            error(json!({"name": "n", "section": {"rate": "high"}})),
            "section.rate is the text \"high\"; expected a number. Correct it, or remove the key for its default"
        );
        assert!(
            error(json!({"name": "n", "section": {"modules": ["a", 2]}}))
                .starts_with("section.modules[1] is 2; expected a text.")
        );
        assert!(error(json!({"name": "n", "section": {"modules": 2}})).contains("expected a text or a list."));
        assert!(
            error(json!({"name": "n", "section": {"ranks": {"x.y": 0.5}}}))
                .starts_with("section.ranks.x.y is 0.5; expected a whole")
        );
        assert!(error(json!({"name": "n", "section": 3})).starts_with("section is 3; expected a section with keys."));
        assert!(
            error(json!({"name": "n", "section": {"start": "gausian"}}))
                .contains("expected one of true, gaussian. Did you mean gaussian?")
        );
        assert!(error(json!({"name": "n", "kind": "cosin"})).contains("one of linear, cosine. Did you mean cosine?"));
        assert!(error(json!({"name": "n", "kind": 5})).contains("kind is 5; expected one of linear, cosine."));
        assert!(error(json!({"name": "n", "count": 0})).contains("count is 0; expected a number of at least 1."));
        assert!(error(json!({"name": "n", "count": 1.0})).contains("count is 1.0; expected a whole number."));
        assert!(error(json!({"count": 1})).contains("name is missing: What it is called."));
        assert!(error(json!({"name": null})).contains("name is nothing (null); expected a text."));
        assert!(error(json!([])).starts_with("the configuration is a list of 0; expected a section with keys."));
    }

    #[test]
    fn overrides_make_and_replace_values() {
        let mut tree = json!({"a": {"b": 1}, "e": null});
        for text in ["a.b=2.5", "a.c=[x, 'y.z']", "d.e.f=text with = sign", "e.f={g: true}", "h=", "i=yes", "j=2e-4"] {
            set(&mut tree, text).unwrap();
        }
        let expected = json!({
            "a": {"b": 2.5, "c": ["x", "y.z"]}, "e": {"f": {"g": true}}, "d": {"e": {"f": "text with = sign"}},
            "h": null, "i": "yes", "j": 0.0002
        });
        assert_eq!(tree, expected);
        for text in ["a.b", "a..b=1", "=1", "a.b.c=1", "a=[", ""] {
            let before = tree.clone();
            let error = set(&mut tree, text).unwrap_err().to_string();
            assert!(error.contains(&format!("override {text:?}")), "{error}");
            assert_eq!(tree, before, "{text}");
        }
    }

    #[test]
    fn broken_yaml_is_an_error_with_its_line() {
        let error = parse("a: 1\nb: [1,\nc: }\n", "run.yaml").unwrap_err().to_string();
        assert!(error.starts_with("run.yaml is not valid YAML: ") && error.contains("line"), "{error}");
        let twice = parse("a: 1\na: 2\n", "x").unwrap_err().to_string();
        assert!(twice.contains("duplicate mapping key `a`") && twice.contains("line 2"), "{twice}");
        assert!(!twice.contains("Options"), "advice for programmers: {twice}");
        assert_eq!(parse("# nothing\n\n", "x").unwrap(), Value::Null);
        for text in ["&a [*a]", "a: &a [*a, *a]", "\u{0}", "{{{{", "- - - : :", "!!binary x", "%YAML 9\n---\n? ", "'"] {
            let _ = parse(text, "x");
        }
    }
}
