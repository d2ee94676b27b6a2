//! The pre-tokenizers that a GGUF file names in `tokenizer.ggml.pre`.
//!
//! A byte-level vocabulary is only half of a tokenizer: how a text is split before merging decides the tokens of numbers,
//! contractions and runs of spaces. A GGUF file carries nothing but a name for that rule, so each known name is given here
//! with the rule that the model's own `tokenizer.json` states, or llama.cpp's where several models share a name. A name that is
//! not listed is refused: a near miss would give token ids that are almost right.

use serde_json::{Value, json};

/// llama.cpp's rule for files that name none.
pub(super) const DEFAULT: &str = "default";

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

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const BLOOM: &str = r" ?[^(\s|[.,!?…。，、।۔،])]+";
/// The letters of scripts with case, as DeepSeek's first models list them.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[",
    r"A-Za-z\x{00B5}\x{00C0}-\x{00D6}\x{00D8}-\x{00F6}\x{00F8}-\x{01BA}\x{01BC}-\x{01BF}\x{01C4}-\x{0293}",
    r"\x{0295}-\x{02AF}\x{0370}-\x{0373}\x{0376}\x{0377}\x{037B}-\x{037D}\x{037F}\x{0386}\x{0388}-\x{038A}",
    r"\x{038C}\x{038E}-\x{03A1}\x{03A3}-\x{03F5}\x{03F7}-\x{0481}\x{048A}-\x{052F}\x{0531}-\x{0556}",
    r"\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}",
    r"\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}",
    r"\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}",
    r"\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}",
    r"\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}",
    r"\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}",
    r"\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}",
    r"\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}",
    r"\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}",
    r"\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}",
    r"]+",
);
const DEEPSEEK_CJK: &str = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+";
const DEEPSEEK_V3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"##,
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// A rule under the names that llama.cpp knows it by. What most rules have in common is filled in here.
const fn rule(names: &'static [&'static str], stages: &'static [Stage]) -> Rule {
    Rule { names, ignore_merges: false, adds_bos: false, nfc: false, stages }
}

const RULES: &[Rule] = &[
    rule(
        &["smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[Stage::Digits, Stage::Gpt2],
    ),
    Rule { nfc: true, ..rule(&["command-r"], &[Stage::Digits, Stage::Gpt2]) },
    Rule {
        ignore_merges: true,
        adds_bos: true,
        ..rule(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
            &[Stage::Split(LLAMA3), Stage::Bytes],
        )
    },
    rule(&["smaug-bpe", "dbrx", "chatglm-bpe"], &[Stage::Split(LLAMA3), Stage::Bytes]),
    Rule { ignore_merges: true, ..rule(&["glm4", "glm5"], &[Stage::Split(LLAMA3), Stage::Bytes]) },
    rule(
        &["gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "jais", "trillion", "granite-docling"],
        &[Stage::Gpt2],
    ),
    // The tokenizer of GPT-NeoX.
    Rule { nfc: true, ..rule(&["mpt", "olmo"], &[Stage::Gpt2]) },
    Rule { nfc: true, ..rule(&["qwen2"], &[Stage::Split(QWEN2), Stage::Bytes]) },
    rule(
        &["deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"],
        &[Stage::Split(QWEN2), Stage::Bytes],
    ),
    Rule { nfc: true, ..rule(&["qwen35"], &[Stage::Split(QWEN35), Stage::Bytes]) },
    Rule { ignore_merges: true, adds_bos: true, ..rule(&["tekken"], &[Stage::Split(TEKKEN), Stage::Bytes]) },
    rule(&["gpt-4o", "llama4", "kanana2", "minimax-m2"], &[Stage::Split(GPT4O), Stage::Bytes]),
    rule(&["bloom", "gpt3-finnish", "poro-chat"], &[Stage::Split(BLOOM), Stage::Bytes]),
    rule(&["viking"], &[Stage::Split(BLOOM), Stage::Digits, Stage::Bytes]),
    rule(
        &["deepseek-llm"],
        &[
            Stage::Split(r"[\r\n]"),
            Stage::Split(DEEPSEEK_LETTERS),
            Stage::Split(r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+"),
            Stage::Split(r"\s+$"),
            Stage::Split(DEEPSEEK_CJK),
            Stage::Digits,
            Stage::Bytes,
        ],
    ),
    rule(
        &["deepseek-coder"],
        &[
            Stage::Split(r"[\r\n]"),
            Stage::Split(r"\s?\p{L}+"),
            Stage::Split(r"\s?\p{P}+"),
            Stage::Split(DEEPSEEK_CJK),
            Stage::Digits,
            Stage::Bytes,
        ],
    ),
    rule(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        &[
            Stage::Split(r"\p{N}{1,3}"),
            Stage::Split(r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"),
            Stage::Split(DEEPSEEK_V3),
            Stage::Bytes,
        ],
    ),
    rule(
        &["falcon"],
        &[Stage::Split(r"[\p{P}\$\+<=>\^~\|`]+"), Stage::Split(GPT2), Stage::Split(r"[0-9][0-9][0-9]"), Stage::Bytes],
    ),
    rule(
        &[DEFAULT],
        &[
            Stage::Split(r"[\p{P}\$\+<=>\^~\|]+"),
            Stage::Split(GPT2),
            Stage::Split(r"\p{N}+"),
            Stage::Split(r"[0-9][0-9][0-9]"),
            Stage::Bytes,
        ],
    ),
];

impl Rule {
    pub(super) fn named(name: &str) -> Option<&'static Rule> {
        RULES.iter().find(|rule| rule.names.contains(&name))
    }

    /// The rule of a `tokenizer.json`, by its parts; the first of several.
    pub(super) fn of(normalizer: &Value, pre_tokenizer: &Value, ignore_merges: bool) -> Option<&'static Rule> {
        let parts = match &pre_tokenizer["pretokenizers"] {
            Value::Array(parts) => parts.as_slice(),
            _ => std::slice::from_ref(pre_tokenizer),
        };
        let is_nfc = match normalizer["type"].as_str() {
            None => false,
            Some("NFC") => true,
            Some(_) => return None,
        };
        RULES.iter().find(|rule| {
            let stages = rule.stages.iter().map(Stage::to_json);
            let fits = |(part, stage): (&Value, Value)| of_pre_tokenizer(part) == of_pre_tokenizer(&stage);
            rule.nfc == is_nfc
                && rule.ignore_merges == ignore_merges
                && rule.stages.len() == parts.len()
                && parts.iter().zip(stages).all(fits)
        })
    }

    /// The name that most models have it by.
    pub(super) fn name(&self) -> &'static str {
        self.names.first().copied().unwrap_or(DEFAULT)
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

/// What of a stage decides how texts are split: `trim_offsets` does not.
fn of_pre_tokenizer(stage: &Value) -> Value {
    let mut stage = stage.clone();
    if let Some(fields) = stage.as_object_mut() {
        fields.remove("trim_offsets");
    }
    stage
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
        assert_eq!(pieces("gpt-4o", "a 1234"), ["a", " ", "123", "4"]);
        assert_eq!(pieces("deepseek-v3", "a 1234"), ["a", " ", "123", "4"]);
        assert_eq!(pieces("bloom", "a 1234"), ["a", " 1234"]);
        assert_eq!(pieces("viking", "a 1234"), ["a", " ", "1", "2", "3", "4"]);
        assert_eq!(pieces("falcon", "a 1234"), ["a", " ", "123", "4"]);
        assert_eq!(pieces("default", "a 1234"), ["a", " ", "123", "4"]);
        assert_eq!(pieces("deepseek-coder", "ab, 12\n"), ["ab", ",", " ", "1", "2", "\n"]);
        assert_eq!(pieces("deepseek-llm", "ab, 12\n"), ["ab", ",", " ", "1", "2", "\n"]);
    }

    #[test]
    fn contractions_and_case_are_split_as_each_model_learned_them() {
        assert_eq!(pieces("smollm", "I'll I'LL"), ["I", "'ll", " I", "'", "LL"]);
        assert_eq!(pieces("llama3", "I'll I'LL"), ["I", "'ll", " I", "'LL"]);
        assert_eq!(pieces("tekken", "fooBar's"), ["foo", "Bar", "'s"]);
        assert_eq!(pieces("gpt-4o", "fooBar's"), ["foo", "Bar's"]);
    }

    #[test]
    fn punctuation_is_split_as_each_model_learned_it() {
        assert_eq!(pieces("bloom", "(a.b) $c!"), ["(", "a", ".", "b", ")", " $c", "!"]);
        assert_eq!(pieces("falcon", "a=`b"), ["a", "=`", "b"]);
        assert_eq!(pieces("default", "a=`b"), ["a", "=", "`", "b"]);
    }
}
