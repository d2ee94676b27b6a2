//! Examples as a person reads them.

use retune_text::tokenizer::Tokenizer;

use super::render::Example;
use crate::error::shortened;

/// The text of an example in pieces, each with whether its tokens are targets, its source first. Special tokens are shown.
pub fn decoded_sample(tokenizer: &Tokenizer, example: &Example) -> Vec<(String, bool)> {
    let mut pieces = Vec::new();
    if !example.source.is_empty() {
        pieces.push((format!("{}\n", tokenizer.decode(&example.source, false)), false));
    }
    let mut shown = String::new();
    let mut end = 0;
    for run in example.trained.chunk_by(|a, b| a == b) {
        let start = end;
        end += run.len();
        // What a token reads as depends on those before it: the piece is what its tokens add to the text.
        let text = tokenizer.decode(example.ids.get(..end).unwrap_or(&example.ids), false);
        let piece = match text.strip_prefix(shown.as_str()) {
            Some(added) => added.to_owned(),
            None => tokenizer.decode(example.ids.get(start..end).unwrap_or_default(), false),
        };
        pieces.push((piece, run.first().copied().unwrap_or(false)));
        shown = text;
    }
    pieces
}

/// The example in one line for an error text: the parts that are targets between «», long parts shortened.
pub(super) fn marked_sample(tokenizer: &Tokenizer, example: &Example) -> String {
    let mark = |(text, trained): (String, bool)| {
        let text = shortened(&text, 160).replace('\n', "\\n");
        if trained { format!("«{text}»") } else { text }
    };
    decoded_sample(tokenizer, example).into_iter().map(mark).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::tokenizer;
    use super::*;

    #[test]
    fn the_pieces_are_the_text() {
        let tokenizer = tokenizer();
        let text = "<s>ab é\nx</s>";
        let ids = tokenizer.encode(text).unwrap();
        for first in 0..=ids.len() {
            let trained = (0..ids.len()).map(|token| token >= first).collect();
            let pieces = decoded_sample(&tokenizer, &Example { row: 0, source: vec![], ids: ids.clone(), trained });
            assert!(pieces.len() <= 2 && pieces.iter().all(|piece| !piece.0.is_empty()));
            let whole: String = pieces.iter().map(|piece| piece.0.as_str()).collect();
            // A cut within é leaves half a character on each side.
            assert!(whole == text || whole.contains('\u{FFFD}'), "{whole}");
        }
        assert!(
            decoded_sample(&tokenizer, &Example { row: 0, source: vec![], ids: vec![], trained: vec![] }).is_empty()
        );
    }

    #[test]
    fn long_parts_are_shortened() {
        let tokenizer = tokenizer();
        let mut ids = tokenizer.encode(&"x".repeat(1000)).unwrap();
        let mut trained = vec![false; ids.len()];
        ids.extend(tokenizer.encode("y\n</s>").unwrap());
        trained.resize(ids.len(), true);
        let sample = marked_sample(&tokenizer, &Example { row: 0, source: vec![], ids, trained });
        assert!(sample.contains("x…x") && sample.ends_with("«y\\n</s>»"), "{sample}");
        assert!(sample.chars().count() < 200);
    }
}
