//! Regular expressions of a configuration, in Python's dialect, anchored as PEFT anchors them.

use fancy_regex::Regex;

use crate::error::Error;

/// A compiled pattern that remembers where it was written, for its errors.
pub(crate) struct Pattern {
    field: &'static str,
    source: String,
    regex: Regex,
}

impl Pattern {
    /// A pattern that the whole text must match (Python's `re.fullmatch`).
    pub(crate) fn full(field: &'static str, source: &str) -> Result<Self, Error> {
        // Alone first: `a)|(b` is no expression, yet it would be one between the parentheses below.
        compile(field, source, &python_escapes(source))?;
        Self::anchored(field, source, &format!(r"{}\z", group(source)))
    }

    /// A pattern for the end of a module name, as the keys of `rank_pattern` and `alpha_pattern` are read.
    pub(crate) fn name_end(field: &'static str, source: &str) -> Result<Self, Error> {
        let source_escaped = python_escapes(source);
        Self::anchored(field, source, &format!(r"(.*\.)?({source_escaped})$"))
    }

    /// A pattern for a module or anything inside it, as the entries of `modules_to_save` are read.
    pub(crate) fn within(field: &'static str, source: &str) -> Result<Self, Error> {
        let source_escaped = python_escapes(source);
        Self::anchored(field, source, &format!(r"(^|.*\.){source_escaped}($|\..*)"))
    }

    /// A pattern that finds a layer's number: after the list named `source`, or in the first numbered place when there is no name.
    pub(crate) fn layer_number(field: &'static str, source: Option<&str>) -> Result<Self, Error> {
        match source {
            None => Self::anchored(field, "", r".*?\.[^.]*\.(?P<idx>\d+)\."),
            Some(name) => {
                let name_escaped = python_escapes(name);
                Self::anchored(field, name, &format!(r"(?:^|.*?\.){name_escaped}\.(?P<idx>\d+)\."))
            }
        }
    }

    /// Python's `re.match`: from the start of the text.
    fn anchored(field: &'static str, source: &str, expression: &str) -> Result<Self, Error> {
        let regex = compile(field, source, &format!(r"\A(?:{expression})"))?;
        Ok(Self { field, source: source.to_owned(), regex })
    }

    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    pub(crate) fn is_match(&self, text: &str) -> Result<bool, Error> {
        self.regex.is_match(text).map_err(|error| pattern_error(self.field, &self.source, &error))
    }

    /// Whether the text matches, and the number that the group `idx` then holds, if any.
    pub(crate) fn number(&self, text: &str) -> Result<Option<Option<usize>>, Error> {
        let captures = self.regex.captures(text).map_err(|error| pattern_error(self.field, &self.source, &error))?;
        Ok(captures.map(|captures| captures.name("idx").and_then(|number| number.as_str().parse().ok())))
    }
}

fn group(source: &str) -> String {
    format!("(?:{})", python_escapes(source))
}

fn compile(field: &'static str, source: &str, expression: &str) -> Result<Regex, Error> {
    Regex::new(expression).map_err(|error| pattern_error(field, source, &error))
}

fn pattern_error(field: &'static str, source: &str, error: &fancy_regex::Error) -> Error {
    Error::Pattern { field, pattern: source.to_owned(), reason: error.to_string() }
}

/// Python's `\Z` (the very end) is `\z` in other dialects.
fn python_escapes(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut characters = source.chars();
    while let Some(character) = characters.next() {
        out.push(character);
        if character == '\\'
            && let Some(escaped) = characters.next()
        {
            out.push(if escaped == 'Z' { 'z' } else { escaped });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(source: &str, text: &str) -> bool {
        Pattern::full("target_modules", source).unwrap().is_match(text).unwrap()
    }

    #[test]
    fn full_patterns_match_whole_names_as_pythons_fullmatch() {
        assert!(full(r".*\.(q|v)_proj", "a.q_proj"));
        assert!(!full("q_proj", "a.q_proj"));
        // The alternative that lets the whole text match counts, not the first.
        assert!(full("a|ab", "ab"));
        assert!(!full("a|ab", "abc"));
        assert!(full(r"a\Z", "a"));
        assert!(full(r"\\Z", r"\Z"));
        // Look-around and back references are part of Python's dialect.
        assert!(full(r"(?!.*\.1\.).*q_proj", "layers.0.q_proj"));
        assert!(!full(r"(?!.*\.1\.).*q_proj", "layers.1.q_proj"));
        assert!(full(r"(?P<n>\d)\.(?P=n)", "3.3"));
    }

    #[test]
    fn a_pattern_that_explodes_is_an_error_not_a_hang() {
        let pattern = Pattern::full("target_modules", "(a|b|ab)*(?=c)").unwrap();
        let error = pattern.is_match(&"ab".repeat(40)).unwrap_err();
        assert!(error.to_string().contains("backtracking"), "{error}");
    }

    #[test]
    fn patterns_of_absurd_depth_or_size_are_refused() {
        assert!(Pattern::full("target_modules", &"(".repeat(10_000)).is_err());
        let deep = format!("{}a{}", "(".repeat(5_000), ")".repeat(5_000));
        assert!(Pattern::full("target_modules", &deep).is_err());
        assert!(Pattern::full("target_modules", "(a{1000}){1000}").is_err());
    }
}
