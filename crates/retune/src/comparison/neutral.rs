//! The neutral text on which each variant is scored before and after: what it got worse at there, it has forgotten.

use serde_json::json;

/// Passages after Lincoln, Austen, Dickens, Melville, Carroll, Darwin, the Declaration of Independence, Doyle, Twain and Smith, all of them in the public
/// domain, some of them shortened, with an empty line between them. They are well known, so that a base that was trained on anything knows them.
const TEXT: &str = include_str!("neutral.txt");
/// Tokens of a passage at most.
pub const MAX_LENGTH: usize = 512;

/// The passages as a data file.
pub fn rows() -> String {
    TEXT.split("\n\n").map(|passage| format!("{}\n", json!({ "text": passage.trim() }))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_passage_is_a_row() {
        let rows = rows();
        assert_eq!(rows.lines().count(), 10);
        for row in rows.lines() {
            let row: serde_json::Value = serde_json::from_str(row).unwrap();
            let text = row["text"].as_str().unwrap();
            assert!(text.len() > 300 && !text.contains('\n'), "{text}");
        }
    }
}
