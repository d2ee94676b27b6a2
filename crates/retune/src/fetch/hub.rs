//! Models from the Hugging Face Hub, through `hf-hub`.
//!
//! One request first: it shows within seconds whether the Hub can be reached, and gives the commit, the files, their sizes and
//! hashes. All files then come from that commit, `config.json` first, and each is checked once it is here. `hf-hub` downloads
//! into a cache of its own within the staging folder and resumes there what was cut off; whole files are moved beside it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow, bail};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{DecimalBytes, ProgressBar};
use retune_formats::atomic;
use retune_model::families;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    CONFIG, INDEX, ModelId, TOKENIZER, WEIGHTS, clear_all_but, is_gguf, is_plain_name, last_part, package,
    remove_if_possible, shards,
};

/// Small files that say how the model is used. Not every model has all of them.
const BESIDE_WEIGHTS: [&str; 5] =
    [TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"];

/// For finding the host and for connecting to it: longer means that there is no network.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// How often a download that breaks off is taken up again, and after how long.
const ATTEMPTS: usize = 4;
const PAUSE: Duration = Duration::from_secs(2);

/// Why the Hub gave no model.
#[derive(Debug)]
pub(super) enum Failure {
    /// There is no network, or something in it answers wrongly.
    Unreachable(Error),
    /// The Hub does not have it, does not give it to this user, or it is nothing that retune can use.
    Refused(Error),
    /// It was on its way.
    BrokeOff(Error),
}

impl Failure {
    pub(super) fn cause(&self) -> &Error {
        let (Self::Unreachable(cause) | Self::Refused(cause) | Self::BrokeOff(cause)) = self;
        cause
    }
}

/// Downloads a model, or goes on with it, within `staging`. Returns the folder that holds the whole of it.
pub(super) fn fetch(id: &ModelId, staging: &Path, out: &dyn Fn(&str)) -> Result<PathBuf, Failure> {
    let hub_cache = staging.join("hub");
    let api = connect(&hub_cache)?;
    let listing = list(&api, &id.repository)?;
    let files = files_for(&listing, id).map_err(Failure::Refused)?;

    let into = staging.join(&listing.commit);
    // Parts from packages stay too: the Hub may yet refuse a file.
    clear_all_but(staging, &[&hub_cache, &into, &staging.join(package::FOLDER)]);
    let revision = Repo::with_revision(id.repository.clone(), RepoType::Model, listing.commit.clone());
    let download = Download { repo: api.repo(revision), hub_cache, into, gated: listing.gated };
    match files {
        Files::Gguf(file) => {
            out(&format!("downloading {id}{}", size_of(&[file])));
            download.file(file)?;
        }
        Files::Directory { config, index, mut others } => {
            refuse_unsupported(&download.file(config)?).map_err(Failure::Refused)?;
            if let Some(index) = index {
                let names = shards(&download.file(index)?).map_err(Failure::Refused)?;
                for name in &names {
                    let shard = listing.file(name).with_context(|| format!("{INDEX} names {name}, which is not there"));
                    others.push(shard.map_err(Failure::Refused)?);
                }
            }
            out(&format!("downloading {id}: {} files{}", others.len(), size_of(&others)));
            for file in others {
                download.file(file)?;
            }
        }
    }
    Ok(download.into)
}

/// What a repository holds at one commit.
#[derive(Debug)]
struct Listing {
    commit: String,
    /// Whether its owner gives it only to those who ask.
    gated: bool,
    files: Vec<RemoteFile>,
}

#[derive(Debug)]
struct RemoteFile {
    /// The path in the repository.
    name: String,
    bytes: Option<u64>,
    /// Known for large files.
    sha256: Option<String>,
}

impl Listing {
    /// Reads the Hub's description of a repository.
    fn read(json: &Value) -> Result<Self> {
        let commit = json.get("sha").and_then(Value::as_str).filter(|sha| is_plain_name(sha));
        let siblings = json.get("siblings").and_then(Value::as_array);
        let (Some(commit), Some(siblings)) = (commit, siblings) else {
            bail!("the answer is not that of a Hugging Face Hub: it has no `sha` and `siblings`");
        };
        let gated = json.get("gated").is_some_and(|gated| !matches!(gated, Value::Null | Value::Bool(false)));
        let file = |sibling: &Value| {
            let sha256 = sibling.pointer("/lfs/sha256").and_then(Value::as_str);
            Some(RemoteFile {
                name: sibling.get("rfilename")?.as_str()?.to_owned(),
                bytes: sibling.get("size").and_then(Value::as_u64),
                sha256: sha256.map(str::to_ascii_lowercase),
            })
        };
        Ok(Self { commit: commit.to_owned(), gated, files: siblings.iter().filter_map(file).collect() })
    }

    fn file(&self, name: &str) -> Option<&RemoteFile> {
        self.files.iter().find(|file| file.name == name)
    }

    fn names_of_ggufs(&self) -> Vec<&str> {
        self.files.iter().map(|file| file.name.as_str()).filter(|name| is_gguf(Path::new(name))).collect()
    }
}

/// What is to be downloaded.
#[derive(Debug)]
enum Files<'a> {
    Gguf(&'a RemoteFile),
    /// `others` holds the weights when they are one file; otherwise `index` names them.
    Directory {
        config: &'a RemoteFile,
        index: Option<&'a RemoteFile>,
        others: Vec<&'a RemoteFile>,
    },
}

/// Chooses the files of a model. Errors: weights or a tokenizer that retune does not read, with what can be asked for instead.
fn files_for<'a>(listing: &'a Listing, id: &ModelId) -> Result<Files<'a>> {
    let ggufs = listing.names_of_ggufs();
    let repository = &id.repository;
    let listed = || match ggufs.as_slice() {
        [] => "it has no GGUF files".to_owned(),
        names => format!("it has the GGUF files {}", names.join(", ")),
    };
    if let Some(name) = &id.gguf {
        let file = listing.file(name).with_context(|| format!("{repository} has no file {name}; {}", listed()))?;
        if is_part_of_split(name) {
            bail!("{name} is one part of a split GGUF file, which retune does not read; {}", listed());
        }
        return Ok(Files::Gguf(file));
    }
    let (weights, index) = (listing.file(WEIGHTS), listing.file(INDEX));
    let has_safetensors = weights.is_some() || index.is_some();
    let Some(config) = listing.file(CONFIG).filter(|_| has_safetensors) else {
        if let Some(example) = ggufs.iter().find(|name| !has_safetensors && !is_part_of_split(name)) {
            bail!(
                "{repository} has no {WEIGHTS}, but GGUF files: name the one you want, as in \
                 `retune fetch {repository}/{example}`; {}",
                listed()
            );
        }
        bail!(
            "{repository} has no {}: retune reads safetensors and GGUF models",
            if has_safetensors { CONFIG } else { WEIGHTS }
        );
    };
    if listing.file(TOKENIZER).is_none() {
        bail!(
            "{repository} has no {TOKENIZER}, the only tokenizer format that retune reads beside GGUF: \
             AutoTokenizer.from_pretrained(..).save_pretrained(..) of transformers writes one"
        );
    }
    let index = if weights.is_none() { index } else { None };
    let beside = BESIDE_WEIGHTS.iter().filter_map(|name| listing.file(name));
    Ok(Files::Directory { config, index, others: beside.chain(weights).collect() })
}

/// Whether a name is like `model-00001-of-00003.gguf`.
fn is_part_of_split(name: &str) -> bool {
    let stem = name.get(..name.len().saturating_sub(".gguf".len())).unwrap_or(name);
    stem.rsplit_once("-of-")
        .is_some_and(|(_, count)| count.len() == 5 && count.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Says before the weights are downloaded that they would be of no use.
fn refuse_unsupported(config: &Path) -> Result<()> {
    let text = fs::read(config).with_context(|| format!("cannot read {}", config.display()))?;
    let json: Value = serde_json::from_slice(&text).with_context(|| format!("its {CONFIG} is not JSON"))?;
    families::describe(&json).with_context(|| format!("its {CONFIG}"))?;
    Ok(())
}

/// ", 269.06 MB", where all sizes are known.
fn size_of(files: &[&RemoteFile]) -> String {
    let total = files.iter().try_fold(0u64, |total, file| total.checked_add(file.bytes?));
    total.map_or(String::new(), |bytes| format!(", {}", DecimalBytes(bytes)))
}

/// The client, as `HF_HUB_OFFLINE`, `HF_ENDPOINT` and `HF_TOKEN` say. Nothing is sent yet.
fn connect(hub_cache: &Path) -> Result<Api, Failure> {
    if variable("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)) {
        return Err(Failure::Unreachable(anyhow!("not asked, because HF_HUB_OFFLINE is set")));
    }
    let mut builder = ApiBuilder::from_cache(Cache::new(hub_cache.to_owned())).with_token(variable("HF_TOKEN"));
    if let Some(endpoint) = variable("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    builder.build().map_err(|error| Failure::Unreachable(plain(error)))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// As `huggingface_hub` reads a switch.
fn is_true(value: &str) -> bool {
    matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
}

fn list(api: &Api, repository: &str) -> Result<Listing, Failure> {
    let request = api.model(repository.to_owned()).info_request().query("blobs", "true");
    let request = request
        .config()
        .http_status_as_error(false)
        .timeout_resolve(Some(CONNECT_TIMEOUT))
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(ANSWER_TIMEOUT))
        .timeout_recv_body(Some(ANSWER_TIMEOUT))
        .build();
    let unreachable = |error| Failure::Unreachable(plain_request(error));
    let mut response = request.call().map_err(unreachable)?;
    let status = response.status();
    match status.as_u16() {
        200 => {}
        code @ (401 | 403 | 404) => return Err(Failure::Refused(no_such_model(repository, code))),
        _ => return Err(Failure::Unreachable(anyhow!("it answered {status}"))),
    }
    let text = response.body_mut().read_to_string().map_err(unreachable)?;
    let json: Value = serde_json::from_str(&text).context("the answer is not JSON").map_err(Failure::Unreachable)?;
    Listing::read(&json).map_err(Failure::Unreachable)
}

/// The Hub answers 401 both for what is private and for what does not exist.
fn no_such_model(repository: &str, code: u16) -> Error {
    let token = match variable("HF_TOKEN") {
        Some(_) => "the token in HF_TOKEN must be valid and of an account that may read it",
        None => "set HF_TOKEN to a token of an account that may read it",
    };
    anyhow!(
        "it has no model {repository} for you (status {code}): check the name; if the model is private or gated, {token}"
    )
}

/// Downloads single files.
struct Download {
    repo: ApiRepo,
    /// Where `hf-hub` keeps the file on its way; whole ones have been moved out.
    hub_cache: PathBuf,
    /// Where whole files go. What is there has been checked.
    into: PathBuf,
    gated: bool,
}

impl Download {
    /// Downloads a file, unless an earlier run has, and returns where it is.
    fn file(&self, file: &RemoteFile) -> Result<PathBuf, Failure> {
        let place = self.into.join(last_part(&file.name));
        if place.is_file() {
            return Ok(place);
        }
        fs::create_dir_all(&self.into)
            .with_context(|| format!("cannot create {}", self.into.display()))
            .map_err(Failure::BrokeOff)?;
        let blob = self.blob(file)?;
        check(&blob, file).and_then(|()| keep(&blob, &place)).map_err(|error| {
            remove_if_possible(&self.hub_cache);
            Failure::BrokeOff(error)
        })?;
        Ok(place)
    }

    /// Lets `hf-hub` download a file, several times if need be: each goes on where the one before broke off.
    fn blob(&self, file: &RemoteFile) -> Result<PathBuf, Failure> {
        let mut attempt = 1;
        loop {
            let error = match self.repo.download_with_progress(&file.name, ProgressBar::new(0)) {
                // A link into the blobs.
                Ok(link) => return fs::canonicalize(link).map_err(|error| Failure::BrokeOff(error.into())),
                Err(error) => error,
            };
            match remedy(&error) {
                _ if attempt == ATTEMPTS => return Err(self.failure(error, file)),
                Remedy::None => return Err(self.failure(error, file)),
                Remedy::StartAgain => remove_if_possible(&self.hub_cache),
                Remedy::GoOn => thread::sleep(PAUSE),
            }
            attempt += 1;
        }
    }

    fn failure(&self, error: ApiError, file: &RemoteFile) -> Failure {
        match status_of(&error) {
            Some(code @ (401 | 403)) => {
                let name = &file.name;
                let first = if self.gated {
                    "the model is gated: ask for access on its page, then"
                } else {
                    "if you may read it,"
                };
                Failure::Refused(anyhow!(
                    "it does not give you {name} (status {code}): {first} set HF_TOKEN to a token of your account"
                ))
            }
            _ => Failure::BrokeOff(plain(error).context(format!("downloading {}", file.name))),
        }
    }
}

/// What may help after a failed download.
enum Remedy {
    GoOn,
    /// What is there already cannot be gone on from.
    StartAgain,
    None,
}

fn remedy(error: &ApiError) -> Remedy {
    match (error, status_of(error)) {
        (ApiError::InvalidResume, _) | (_, Some(416)) => Remedy::StartAgain,
        (_, Some(408 | 429 | 500..=599)) => Remedy::GoOn,
        (_, Some(_)) => Remedy::None,
        (ApiError::RequestError(_), None) => Remedy::GoOn,
        (ApiError::IoError(error), None) => match error.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem => Remedy::None,
            _ => Remedy::GoOn,
        },
        _ => Remedy::None,
    }
}

fn status_of(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        _ => None,
    }
}

/// An error without the wrappings that repeat its text.
fn plain(error: ApiError) -> Error {
    match error {
        ApiError::IoError(error) => error.into(),
        ApiError::RequestError(error) => plain_request(*error),
        other => other.into(),
    }
}

fn plain_request(error: ureq::Error) -> Error {
    match error {
        ureq::Error::Io(error) => error.into(),
        ureq::Error::HostNotFound => anyhow!("host not found (is there a network?)"),
        ureq::Error::StatusCode(code) => anyhow!("it answered with status {code}"),
        other => other.into(),
    }
}

/// Compares a file with what the Hub says of it.
fn check(path: &Path, expected: &RemoteFile) -> Result<()> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let found = file.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
    if let Some(bytes) = expected.bytes.filter(|bytes| *bytes != found) {
        bail!("{} arrived with {found} bytes instead of {bytes}: fetch it again", expected.name);
    }
    if let Some(sha256) = &expected.sha256 {
        let mut hash = Sha256::new();
        io::copy(&mut file, &mut hash).with_context(|| format!("cannot read {}", path.display()))?;
        let found = format!("{:x}", hash.finalize());
        if found != *sha256 {
            bail!("{} arrived damaged (sha256 {found} instead of {sha256}): fetch it again", expected.name);
        }
    }
    Ok(())
}

/// Moves a file to its place, flushed to the disk.
fn keep(blob: &Path, place: &Path) -> Result<()> {
    let flush = || OpenOptions::new().append(true).open(blob)?.sync_all();
    flush().with_context(|| format!("cannot write {}", blob.display()))?;
    Ok(atomic::rename(blob, place)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn listing(names: &[&str]) -> Listing {
        let siblings: Vec<Value> = names.iter().map(|name| json!({"rfilename": name, "size": 7})).collect();
        Listing::read(&json!({"sha": "0123abcd", "siblings": siblings})).unwrap()
    }

    /// The names of what would be downloaded, or why nothing would.
    fn chosen(names: &[&str], id: &str) -> Result<Vec<String>, String> {
        let listing = listing(names);
        let id = ModelId::parse(id).unwrap();
        let files = files_for(&listing, &id).map_err(|error| error.to_string())?;
        Ok(match files {
            Files::Gguf(file) => vec![file.name.clone()],
            Files::Directory { config, index, others } => {
                [config].into_iter().chain(index).chain(others).map(|file| file.name.clone()).collect()
            }
        })
    }

    #[test]
    fn a_listing_has_sizes_and_hashes_where_the_hub_gives_them() {
        let json = json!({"sha": "0123abcd", "gated": "auto", "siblings": [
            {"rfilename": "config.json", "size": 700, "blobId": "x"},
            {"rfilename": "model.safetensors", "size": 9, "lfs": {"sha256": "ABC", "size": 9}},
            {"no name": 1}]});
        let listing = Listing::read(&json).unwrap();
        assert!(listing.gated);
        assert_eq!(listing.files.len(), 2);
        assert_eq!(listing.file("config.json").unwrap().sha256, None);
        let weights = listing.file("model.safetensors").unwrap();
        assert_eq!((weights.bytes, weights.sha256.as_deref()), (Some(9), Some("abc")));
        assert!(!Listing::read(&json!({"sha": "0", "gated": false, "siblings": []})).unwrap().gated);
        for not_one in
            [json!([]), json!({"siblings": []}), json!({"sha": "../..", "siblings": []}), json!({"sha": "0"})]
        {
            assert!(Listing::read(&not_one).is_err(), "{not_one}");
        }
    }

    #[test]
    fn a_directory_is_config_tokenizer_and_safetensors() {
        let all = ["README.md", CONFIG, TOKENIZER, WEIGHTS, "pytorch_model.bin", "q8.gguf", "generation_config.json"];
        let files = chosen(&all, "me/tiny").unwrap();
        assert_eq!(files, [CONFIG, TOKENIZER, "generation_config.json", WEIGHTS]);
        let files = chosen(&[CONFIG, TOKENIZER, INDEX, "model-00001-of-00002.safetensors"], "me/tiny").unwrap();
        assert_eq!(files, [CONFIG, INDEX, TOKENIZER]);
        // Both: the whole file is enough.
        let files = chosen(&[CONFIG, TOKENIZER, INDEX, WEIGHTS], "me/tiny").unwrap();
        assert_eq!(files, [CONFIG, TOKENIZER, WEIGHTS]);
    }

    #[test]
    fn what_cannot_be_used_is_refused_before_it_is_downloaded() {
        let text = chosen(&["README.md", "tiny-q4.gguf"], "me/tiny").unwrap_err();
        assert!(text.contains("retune fetch me/tiny/tiny-q4.gguf"), "{text}");
        let text = chosen(&[CONFIG, TOKENIZER, "pytorch_model.bin"], "me/tiny").unwrap_err();
        assert!(text.contains(WEIGHTS), "{text}");
        let text = chosen(&[TOKENIZER, WEIGHTS], "me/tiny").unwrap_err();
        assert!(text.contains(CONFIG), "{text}");
        let text = chosen(&[CONFIG, WEIGHTS, "tokenizer.model"], "me/tiny").unwrap_err();
        assert!(text.contains(TOKENIZER) && text.contains("save_pretrained"), "{text}");

        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join(CONFIG);
        fs::write(&config, r#"{"model_type": "bert"}"#).unwrap();
        let text = format!("{:#}", refuse_unsupported(&config).unwrap_err());
        assert!(text.contains("bert") && text.contains("llama"), "{text}");
        fs::write(&config, r#"{"model_type": "llama"}"#).unwrap();
        refuse_unsupported(&config).unwrap();
    }

    #[test]
    fn one_gguf_file_can_be_asked_for() {
        let names = [CONFIG, WEIGHTS, "q4.gguf", "sub/q8.gguf", "big-00001-of-00002.gguf"];
        assert_eq!(chosen(&names, "me/tiny/sub/q8.gguf").unwrap(), ["sub/q8.gguf"]);
        let text = chosen(&names, "me/tiny/q5.gguf").unwrap_err();
        assert!(text.contains("no file q5.gguf") && text.contains("q4.gguf, sub/q8.gguf"), "{text}");
        let text = chosen(&names, "me/tiny/big-00001-of-00002.gguf").unwrap_err();
        assert!(text.contains("split"), "{text}");
        assert!(!is_part_of_split("best-of-all.gguf") && !is_part_of_split("x"));
    }

    #[test]
    fn another_size_or_hash_than_the_hub_gives_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        fs::write(&path, "content").unwrap();
        let expected = |bytes, sha256: Option<&str>| RemoteFile {
            name: WEIGHTS.to_owned(),
            bytes,
            sha256: sha256.map(ToOwned::to_owned),
        };
        let right = format!("{:x}", Sha256::digest("content"));
        check(&path, &expected(Some(7), Some(&right))).unwrap();
        check(&path, &expected(None, None)).unwrap();
        assert!(check(&path, &expected(Some(8), None)).unwrap_err().to_string().contains("7 bytes instead of 8"));
        assert!(check(&path, &expected(Some(7), Some("abc"))).unwrap_err().to_string().contains("damaged"));
    }

    #[test]
    fn hostile_sizes_do_not_overflow() {
        let file = |bytes| RemoteFile { name: WEIGHTS.to_owned(), bytes, sha256: None };
        let (huge, unknown, small) = (file(Some(u64::MAX)), file(None), file(Some(2_000_000)));
        assert_eq!(size_of(&[&huge, &small]), "");
        assert_eq!(size_of(&[&small, &unknown]), "");
        assert_eq!(size_of(&[&small]), ", 2.00 MB");
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let io = |kind: io::ErrorKind| remedy(&ApiError::IoError(kind.into()));
        assert!(matches!(io(io::ErrorKind::StorageFull), Remedy::None));
        assert!(matches!(io(io::ErrorKind::UnexpectedEof), Remedy::GoOn));
        let status = |code| remedy(&ApiError::RequestError(Box::new(ureq::Error::StatusCode(code))));
        assert!(matches!(status(404), Remedy::None));
        assert!(matches!(status(416), Remedy::StartAgain));
        assert!(matches!(status(503), Remedy::GoOn));
        assert!(matches!(remedy(&ApiError::InvalidResume), Remedy::StartAgain));
    }
}
