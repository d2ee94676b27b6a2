//! The rules of ARCHITECTURE.md that a test can hold the code against.

use std::fs;
use std::path::{Path, PathBuf};

use retune_adapter::METHODS;
use retune_model::families::FAMILIES;

/// The crates in the order of ARCHITECTURE.md's map: each may import those before it.
const ORDER: [&str; 11] = [
    "retune-kernels",
    "retune-quant",
    "retune-engine",
    "retune-formats",
    "retune-text",
    "retune-model",
    "retune-adapter",
    "retune-train",
    "retune-eval",
    "retune-testing",
    "retune",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// The crates of this workspace among a crate's dependencies, those of its tests left out.
fn dependencies(name: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join("crates").join(name).join("Cargo.toml")).unwrap();
    let section = text.split("[dependencies]").nth(1).unwrap_or_default();
    let section = section.split("\n[").next().unwrap_or_default();
    section
        .lines()
        .filter(|line| line.starts_with("retune-"))
        .map(|line| line.split(['.', ' ']).next().unwrap().to_owned())
        .collect()
}

#[test]
fn no_crate_imports_one_that_stands_below_it_in_the_map() {
    let mut crates: Vec<String> =
        fs::read_dir(root().join("crates")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    crates.sort();
    let mut expected: Vec<&str> = ORDER.to_vec();
    expected.sort_unstable();
    assert_eq!(crates, expected, "a crate without a place in the order");
    for (place, name) in ORDER.iter().enumerate() {
        for dependency in dependencies(name) {
            let below = ORDER.iter().position(|other| *other == dependency);
            assert!(below.is_some_and(|below| below < place), "{name} imports {dependency}, which comes after it");
        }
    }
    assert!(!dependencies("retune").contains(&"retune-testing".to_owned()), "the program holds what is for tests");
}

/// Words of a text, in lower case, as names are told apart in code and prose.
fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-')).map(str::to_ascii_lowercase)
}

#[test]
fn the_engine_names_no_family_and_no_method() {
    let mut names: Vec<String> = FAMILIES.iter().flat_map(|f| f.model_types).map(|name| (*name).to_owned()).collect();
    names.extend(FAMILIES.iter().flat_map(|f| f.gguf.as_ref()).map(|gguf| gguf.architecture.to_owned()));
    names.extend(METHODS.iter().filter_map(|method| method.peft_type).map(str::to_ascii_lowercase));
    // How prose spells some of them, and methods that are to come.
    names.extend(
        ["gpt-2", "phi-3", "qwen", "gemma-3", "peft", "rslora", "qlora", "dora", "ia3", "bitfit"].map(str::to_owned),
    );
    for name in ["retune-kernels", "retune-engine"] {
        for path in sources(&root().join("crates").join(name).join("src")) {
            let text = fs::read_to_string(&path).unwrap();
            if let Some(word) = words(&text).find(|word| names.contains(word)) {
                panic!("{} says {word}", path.display());
            }
        }
    }
}

#[test]
fn the_engine_reads_no_file() {
    for path in sources(&root().join("crates/retune-engine/src")) {
        let text = fs::read_to_string(&path).unwrap();
        for word in ["std::fs", "serde_json", "std::path", "std::env"] {
            assert!(!text.contains(word), "{} uses {word}", path.display());
        }
    }
}

#[test]
fn files_are_written_where_no_half_written_one_is_found() {
    for path in ORDER.iter().flat_map(|name| sources(&root().join("crates").join(name).join("src"))) {
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("mod tests {").next().unwrap();
        let is_for_tests = ["testing.rs", "fixture.rs"].iter().any(|name| path.ends_with(name))
            || path.to_string_lossy().contains("retune-testing");
        // Fetching goes on with parts of files, which have names of their own until they are checked.
        let is_its_place =
            path.ends_with("retune-formats/src/atomic.rs") || path.to_string_lossy().contains("retune/src/fetch");
        for word in ["fs::write", "File::create", "OpenOptions", "fs::rename", "fs::copy"] {
            assert!(
                is_for_tests || is_its_place || !code.contains(word),
                "{} uses {word}, not retune_formats::atomic",
                path.display()
            );
        }
    }
}

/// Rows of the table of README that begins with this column.
fn table(first_column: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(root().join("README.md")).unwrap();
    let rows = text.lines().skip_while(|line| !line.starts_with(&format!("| {first_column} |"))).skip(2);
    rows.take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

#[test]
fn the_tables_of_the_readme_are_the_lists_in_the_code() {
    let families: Vec<Vec<String>> = FAMILIES
        .iter()
        .map(|family| {
            let types: Vec<String> = family.model_types.iter().map(|name| format!("`{name}`")).collect();
            let gguf = family.gguf.as_ref().map_or(String::new(), |gguf| format!("`{}`", gguf.architecture));
            vec![family.models.to_owned(), types.join(", "), gguf]
        })
        .collect();
    assert_eq!(table("models"), families);
    let methods: Vec<Vec<String>> =
        METHODS.iter().map(|method| vec![format!("`{}`", method.name), method.what.to_owned()]).collect();
    assert_eq!(table("`method`"), methods);
}
