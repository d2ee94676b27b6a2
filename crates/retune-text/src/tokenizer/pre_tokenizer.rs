//! The pre-tokenizers that a GGUF file names in `tokenizer.ggml.pre`.
//!
//! A byte-level vocabulary is only half of a tokenizer: how a text is split before merging decides the tokens of numbers,
//! contractions and runs of spaces. A GGUF file carries nothing but a name for that rule, so each known name is given here
//! with the rule that the model's own `tokenizer.json` states. A name that is not listed is refused: a near miss would give
//! token ids that are almost right.

use serde_json::{Value, json};

/// What a name stands for.
pub(super) struct Rule {
    names: &'static [&'static str],
    /// A piece that is a token as a whole is taken as such, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// A BOS token starts every text, unless the file says otherwise.
    pub(super) adds_bos: bool,
    /// Text is brought to Unicode's composed form first.
    nfc: bool,
    stages: &'static [Stage],
}

enum Stage {
    /// Each digit, of any script, on its own.
    Digits,
    /// Matches of the pattern are pieces, and so is what lies between them.
    Split(&'static str),
    /// GPT-2's pattern, then bytes as characters.
    Gpt2,
    /// Bytes as characters, no further split.
    Bytes,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

const RULES: &[Rule] = &[
    Rule {
        names: &["smollm", "starcoder", "refact", "codeshell"],
        ignore_merges: false,
        adds_bos: false,
        nfc: false,
        stages: &[Stage::Digits, Stage::Gpt2],
    },
    Rule {
        names: &["llama-bpe", "llama3", "llama-v3"],
        ignore_merges: true,
        adds_bos: true,
        nfc: false,
        stages: &[Stage::Split(LLAMA3), Stage::Bytes],
    },
    Rule { names: &["gpt-2", "phi-2"], ignore_merges: false, adds_bos: false, nfc: false, stages: &[Stage::Gpt2] },
    Rule {
        names: &["qwen2"],
        ignore_merges: false,
        adds_bos: false,
        nfc: true,
        stages: &[Stage::Split(QWEN2), Stage::Bytes],
    },
    Rule {
        names: &["tekken"],
        ignore_merges: true,
        adds_bos: true,
        nfc: false,
        stages: &[Stage::Split(TEKKEN), Stage::Bytes],
    },
    Rule {
        names: &["deepseek-coder"],
        ignore_merges: false,
        adds_bos: false,
        nfc: false,
        stages: &[
            Stage::Split(r"[\r\n]"),
            Stage::Split(r"\s?\p{L}+"),
            Stage::Split(r"\s?\p{P}+"),
            Stage::Split(r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"),
            Stage::Digits,
            Stage::Bytes,
        ],
    },
];

impl Rule {
    pub(super) fn named(name: &str) -> Option<&'static Rule> {
        RULES.iter().find(|rule| rule.names.contains(&name))
    }

    /// The `pre_tokenizer` part of a `tokenizer.json`.
    pub(super) fn pre_tokenizer(&self) -> Value {
        let stages: Vec<Value> = self.stages.iter().map(Stage::to_json).collect();
        json!({"type": "Sequence", "pretokenizers": stages})
    }

    /// The `normalizer` part of a `tokenizer.json`.
    pub(super) fn normalizer(&self) -> Value {
        if self.nfc { json!({"type": "NFC"}) } else { Value::Null }
    }
}

impl Stage {
    fn to_json(&self) -> Value {
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        match self {
            Stage::Digits => json!({"type": "Digits", "individual_digits": true}),
            Stage::Split(pattern) => {
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
            }
            Stage::Gpt2 => byte_level(true),
            Stage::Bytes => byte_level(false),
        }
    }
}

/// Every known name, for error texts.
pub(super) fn known_names() -> String {
    RULES.iter().flat_map(|rule| rule.names).copied().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

    use super::*;

    /// The pieces of `text`, as byte ranges turned back into text.
    fn pieces(name: &str, text: &str) -> Vec<String> {
        let json = Rule::named(name).unwrap().pre_tokenizer();
        let rule: PreTokenizerWrapper = serde_json::from_str(&json.to_string()).unwrap();
        let mut split = PreTokenizedString::from(text);
        rule.pre_tokenize(&mut split).unwrap();
        split
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (start, end), _)| text[start..end].to_owned())
            .collect()
    }

    #[test]
    fn every_rule_compiles_and_covers_the_text() {
        let text = "I'LL sing 12345 x²\n\n  私は学生 été¿…\r\n\tend  ";
        for name in RULES.iter().flat_map(|rule| rule.names) {
            assert_eq!(pieces(name, text).concat(), text, "{name}");
        }
    }

    #[test]
    fn names_are_not_listed_twice() {
        let mut names: Vec<_> = RULES.iter().flat_map(|rule| rule.names).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn numbers_are_split_as_each_model_learned_them() {
        assert_eq!(pieces("smollm", "a 1234"), ["a", " ", "1", "2", "3", "4"]);
        assert_eq!(pieces("llama-bpe", "a 1234"), ["a", " ", "123", "4"]);
        assert_eq!(pieces("gpt-2", "a 1234"), ["a", " 1234"]);
        assert_eq!(pieces("qwen2", "a12"), ["a", "1", "2"]);
        assert_eq!(pieces("deepseek-coder", "ab, 12\n"), ["ab", ",", " ", "1", "2", "\n"]);
    }

    #[test]
    fn contractions_and_case_are_split_as_each_model_learned_them() {
        assert_eq!(pieces("smollm", "I'll I'LL"), ["I", "'ll", " I", "'", "LL"]);
        assert_eq!(pieces("llama3", "I'll I'LL"), ["I", "'ll", " I", "'LL"]);
        assert_eq!(pieces("tekken", "fooBar"), ["foo", "Bar"]);
    }
}
