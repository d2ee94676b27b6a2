//! The model card beside an adapter: `README.md` as PEFT writes one, with what is known of the run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use retune_adapter::Method;
use retune_formats::atomic;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::fetch;

/// The name of a model card.
pub const CARD: &str = "README.md";
/// What stands before the hash in a card's last line.
const MARK: &str = "<!-- Written by retune, which leaves this file alone once it has been edited: ";

/// What a card says.
pub struct Card<'a> {
    pub method: &'a dyn Method,
    /// The base, as the run names it.
    pub base_model: Option<&'a str>,
    /// How the adapter came to be, in a sentence.
    pub summary: String,
    /// Rows of the table: what, and its value.
    pub rows: Vec<(&'static str, String)>,
}

impl Card<'_> {
    /// Writes the card into an adapter's folder, unless a person has edited the one that is there.
    ///
    /// # Errors
    /// What the system refuses; settings that JSON cannot hold.
    pub fn write(&self, folder: &Path) -> Result<()> {
        if let Some(path) = edited(folder) {
            note!("! {} was edited: it is left as it is", path.display());
            return Ok(());
        }
        Ok(atomic::write(&folder.join(CARD), signed(self.text()?).as_bytes())?)
    }

    fn text(&self) -> Result<String> {
        let base = self.base_model.map(fetch::public_name);
        let lora = self.method.lora().map(|_| "lora".to_owned());
        let mut tags: Vec<String> = base.iter().map(|base| format!("base_model:adapter:{base}")).collect();
        tags.extend(lora);
        tags.push("transformers".to_owned());
        let mut text = "---\n".to_owned();
        if let Some(base) = &base {
            text += &format!("base_model: {}\n", scalar(base));
        }
        let is_of_peft = self.method.info().is_of_peft();
        text += &format!("library_name: {}\n", if is_of_peft { "peft" } else { "retune" });
        text += "pipeline_tag: text-generation\ntags:\n";
        for tag in &tags {
            text += &format!("- {}\n", scalar(tag));
        }
        let of = base.as_ref().map_or_else(String::new, |base| format!(" for {base}"));
        text += &format!("---\n\n# An adapter{of}\n\n{}\n\n", self.summary);
        text += match is_of_peft {
            true => "The files are PEFT's: `PeftModel.from_pretrained` loads this folder on its base.\n\n",
            false => "PEFT knows no such adapter: `retune` loads this folder on its base, and merges it.\n\n",
        };
        text += "| | |\n|---|---|\n";
        let mut row = |what: &str, value: &str| {
            let value = value.replace('|', "\\|").replace(['\n', '\r'], " ");
            text += &format!("| {what} | {value} |\n");
        };
        row("method", self.method.info().name);
        let settings = self.method.settings()?;
        for (key, value) in settings.as_object().into_iter().flatten().filter(|(_, value)| says(value)) {
            row(&format!("`{key}`"), &plain(value));
        }
        for (what, value) in &self.rows {
            row(what, value);
        }
        row("made with", &format!("retune {}", env!("CARGO_PKG_VERSION")));
        Ok(text)
    }
}

/// The card in an adapter's folder, where it is not as it was written.
pub fn edited(folder: &Path) -> Option<PathBuf> {
    let path = folder.join(CARD);
    // What cannot be read is left alone as well.
    if !path.exists() || fs::read_to_string(&path).is_ok_and(|text| is_untouched(&text)) {
        return None;
    }
    Some(path)
}

/// A text with its own hash in its last line.
fn signed(text: String) -> String {
    let hash = hash(&text);
    format!("{text}\n{MARK}{hash} -->\n")
}

/// Whether a card is as it was written.
fn is_untouched(card: &str) -> bool {
    // A checkout may have changed the ends of lines.
    let card = card.replace("\r\n", "\n");
    let Some((text, mark)) = card.rsplit_once(&format!("\n{MARK}")) else { return false };
    mark.strip_suffix(" -->\n") == Some(&hash(text))
}

fn hash(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A string as YAML, quoted where it must be.
fn scalar(text: &str) -> String {
    let is_plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:".contains(c))
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && !text.ends_with(':');
    if is_plain { text.to_owned() } else { Value::from(text).to_string() }
}

/// Whether a setting is not just absent.
fn says(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
        _ => true,
    }
}

/// A setting as a card shows it.
pub fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{text}`"),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_knows_whether_it_was_edited() {
        let card = signed("---\nlibrary_name: peft\n---\n\n# An adapter\n".to_owned());
        assert!(is_untouched(&card) && is_untouched(&card.replace('\n', "\r\n")));
        for changed in [
            card.replace("An adapter", "My adapter"),
            format!("{card}Mine.\n"),
            format!("Mine.\n{card}"),
            "# Mine\n".to_owned(),
            String::new(),
            signed(card.clone()).replace("An adapter", "Mine"),
        ] {
            assert!(!is_untouched(&changed), "{changed}");
        }
    }

    #[test]
    fn names_say_nothing_of_this_machine() {
        let name = fetch::public_name;
        assert_eq!(name("owner/name"), "owner/name");
        assert_eq!(name("owner/name/model.gguf"), "owner/name");
        assert_eq!(name("/home/me/models/small"), "small");
        assert_eq!(name("./models/small.gguf"), "small.gguf");
        let plain = ["owner/name-1.5", "base_model:adapter:owner/name"];
        plain.iter().for_each(|text| assert_eq!(scalar(text), *text));
        assert_eq!((scalar("a: b").as_str(), scalar("1e3").as_str()), ("\"a: b\"", "\"1e3\""));
    }
}
