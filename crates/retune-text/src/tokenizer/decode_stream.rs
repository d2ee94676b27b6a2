//! Text of tokens as they are generated.

use super::Tokenizer;

/// Turns token ids into text one by one, see [`Tokenizer::decode_stream`].
///
/// A token may end in the middle of a character, and what a token reads as depends on what is before it (a leading space is
/// dropped at the start of a text only). So the last tokens shown are decoded again together with the new ones, and the
/// difference is the new text.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens of the last piece that was shown, then those not shown yet.
    ids: Vec<u32>,
    /// How many of `ids` were shown.
    shown: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        DecodeStream { tokenizer, ids: Vec::new(), shown: 0 }
    }

    /// The text that `id` completes: whole characters only, `None` while there is nothing to show.
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, true);
        // The start of a character whose other bytes are still to come decodes to the replacement character.
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return None;
        }
        self.advance(&text)
    }

    /// The text still held back when no more tokens come; a character that was never completed shows as U+FFFD.
    pub fn finish(&mut self) -> Option<String> {
        let text = self.tokenizer.decode(&self.ids, true);
        self.advance(&text)
    }

    fn advance(&mut self, text: &str) -> Option<String> {
        let shown = self.tokenizer.decode(&self.ids[..self.shown], true);
        let new = text.strip_prefix(shown.as_str()).filter(|new| !new.is_empty())?.to_owned();
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Some(new)
    }
}

#[cfg(test)]
mod tests {
    use crate::tokenizer::fixture;

    #[test]
    fn characters_of_several_tokens_come_out_whole() {
        let tokenizer = fixture::byte_level();
        let text = "aé🦀 ab\n私 end";
        let ids = tokenizer.encode(text).unwrap();
        assert!(ids.len() > text.chars().count(), "the crab must be split into bytes");
        let mut stream = tokenizer.decode_stream();
        let pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id)).collect();
        assert!(pieces.iter().all(|piece| !piece.is_empty() && !piece.contains('\u{FFFD}')), "{pieces:?}");
        assert_eq!(pieces.concat(), text);
        assert_eq!(stream.finish(), None);
    }

    #[test]
    fn an_unfinished_character_is_held_back_until_the_end() {
        let tokenizer = fixture::byte_level();
        let ids = tokenizer.encode("a🦀").unwrap();
        let mut stream = tokenizer.decode_stream();
        let pieces: Vec<String> = ids[..ids.len() - 1].iter().filter_map(|&id| stream.push(id)).collect();
        assert_eq!(pieces, ["a"]);
        assert_eq!(stream.finish().as_deref(), Some("\u{FFFD}"));
        assert_eq!(stream.finish(), None);
    }

    #[test]
    fn only_the_first_leading_space_is_dropped() {
        let tokenizer = fixture::sentence_piece();
        let ids = tokenizer.encode("ab ab</s>ab é").unwrap();
        let mut stream = tokenizer.decode_stream();
        let pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id)).collect();
        assert_eq!(pieces.concat(), tokenizer.decode(&ids, true));
        assert!(pieces.concat().starts_with("ab ab"));
    }

    #[test]
    fn special_tokens_print_nothing() {
        let tokenizer = fixture::byte_level();
        let mut stream = tokenizer.decode_stream();
        let end = tokenizer.token_to_id("<|im_end|>").unwrap();
        assert_eq!(stream.push(end), None);
        assert_eq!(stream.push(u32::MAX), None);
        assert_eq!(stream.finish(), None);
    }
}
