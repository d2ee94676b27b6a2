//! Where the tests that need the real SmolLM2-135M-Instruct find it.

use std::path::{Path, PathBuf};

/// The file that the goldens were made from.
pub const GGUF: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The folder that the environment variable `RETUNE_TEST_MODELS` names; none, with a note, without it.
pub fn models() -> Option<PathBuf> {
    let folder = std::env::var_os("RETUNE_TEST_MODELS").map(PathBuf::from);
    if folder.is_none() {
        println!("skipped: RETUNE_TEST_MODELS is not set");
    }
    folder
}

/// The GGUF file, where the folder holds it.
pub fn gguf_in(folder: &Path) -> Option<PathBuf> {
    Some(folder.join(GGUF)).filter(|path| path.is_file())
}
