//! Tiny tokenizers for tests, one of each kind.

use super::Tokenizer;
use super::gguf::Vocabulary;

/// SmolLM2's kind: three special tokens, the 256 bytes, and `ab`.
pub(crate) fn byte_level() -> Tokenizer {
    Tokenizer::assemble(byte_level_vocabulary().into_parts().unwrap()).unwrap()
}

/// Llama 2's kind: three special tokens, the 256 bytes, `▁`, `a`, `b`, and what they merge to.
pub(crate) fn sentence_piece() -> Tokenizer {
    Tokenizer::assemble(sentence_piece_vocabulary().into_parts().unwrap()).unwrap()
}

pub(super) fn byte_level_vocabulary() -> Vocabulary<'static> {
    let mut tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned).to_vec();
    // GPT-2's alphabet: bytes that print stand for themselves, the others for the characters from 256 on.
    let prints = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    tokens.extend((0..=255u8).filter(|&byte| prints(byte)).map(|byte| char::from(byte).to_string()));
    let others = (0..=255u8).filter(|&byte| !prints(byte)).count() as u32;
    tokens.extend((256..256 + others).filter_map(char::from_u32).map(String::from));
    tokens.push("ab".to_owned());
    let mut types = vec![1; tokens.len()];
    types[..3].fill(3);
    Vocabulary {
        model: "gpt2",
        pre: Some("smollm"),
        tokens,
        types,
        merges: Some(vec!["a b"]),
        bos: Some(1),
        eos: Some(0),
        unk: Some(0),
        pad: Some(2),
        chat_template: Some("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"),
        context_length: Some(512),
        ..Vocabulary::default()
    }
}

pub(super) fn sentence_piece_vocabulary() -> Vocabulary<'static> {
    let mut tokens = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["ab", "▁a", "▁ab", "▁", "a", "b"].map(str::to_owned));
    let mut types = vec![1; tokens.len()];
    types[..3].copy_from_slice(&[2, 3, 3]);
    types[3..259].fill(6);
    // SentencePiece numbers its scores down from 0 in the order of the vocabulary.
    let scores = (0..tokens.len()).map(|id| -(id.saturating_sub(258) as f32)).collect();
    Vocabulary {
        model: "llama",
        tokens,
        types,
        scores: Some(scores),
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        ..Vocabulary::default()
    }
}

/// T5's kind: three special tokens, `▁`, `a`, `b`, `▁ab`.
pub(super) fn unigram_vocabulary() -> Vocabulary<'static> {
    let tokens = ["<pad>", "</s>", "<unk>", "▁", "a", "b", "▁ab"].map(str::to_owned).to_vec();
    let scores = vec![0.0, 0.0, 0.0, -2.0, -3.0, -3.0, -4.0];
    Vocabulary {
        model: "t5",
        types: [vec![3, 3, 2], vec![1; tokens.len() - 3]].concat(),
        tokens,
        scores: Some(scores),
        eos: Some(1),
        unk: Some(2),
        pad: Some(0),
        ..Vocabulary::default()
    }
}
