//! An adapter on disk: `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes and reads them.
//!
//! A file may come from anywhere, so nothing in it is trusted. Files are written under another name, flushed to the disk and renamed:
//! under their own names they are always whole.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use retune_engine::model::Weights;
use retune_engine::overlay::Overlay;
use retune_engine::spec::ModelSpec;
use retune_formats::atomic::{Staged, io_error};
use retune_formats::safetensors::{self, Tensor, Values};
use retune_quant::SharedBytes;

use crate::error::Error;
use crate::method::Method;
use crate::names::{self, Key, Part};
use crate::peft_config;
use crate::targets::BaseModules;

/// Name of the configuration's file.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the tensors' file.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// How far, relative to its norm, a weight quantized to a few bits may lie from itself.
const QUANTIZED: f64 = 0.2;

/// An adapter as it lies on disk.
#[derive(Debug, Clone)]
pub struct AdapterFile {
    /// Its method, with its settings.
    pub method: Arc<dyn Method>,
    /// The base model it was trained on, as its configuration names it.
    pub base_model: Option<String>,
    /// Shape and values by key, in the spelling of [`crate::names`]; values row-major.
    pub tensors: Tensors,
}

impl AdapterFile {
    /// The adapter that training has made: `params` is the overlay's flat vector.
    pub fn of(method: &Arc<dyn Method>, base_model: Option<String>, overlay: &Overlay, params: &[f32]) -> Self {
        let exported = method.exported(overlay, params);
        let (method, tensors) = exported.unwrap_or_else(|| (method.clone(), tensors_of(overlay, params)));
        Self { method, base_model, tensors }
    }

    /// Reads the adapter in a directory. Keys are brought to one spelling, numbers to f32; whether it fits a model is for [`Self::lower`] to say.
    ///
    /// # Errors
    /// A variant of [`Error`] for each way in which the two files can be absent, damaged or of another method.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let config_path = dir.join(CONFIG_FILE);
        let text = read_file(&config_path, "Expected the directory of an adapter saved by retune or PEFT")?;
        let value = serde_json::from_slice(&text).map_err(|error| Error::Json { path: config_path.clone(), error })?;
        let (method, base_model) = peft_config::parse(&config_path, value)?;

        let weights_path = dir.join(WEIGHTS_FILE);
        let advice = if dir.join("adapter_model.bin").exists() {
            "There is an adapter_model.bin, which can run code when it is loaded: save the adapter again with safe_serialization"
        } else {
            "The directory has a configuration but no weights: copy or save the adapter again"
        };
        let tensors = read_tensors(&*method, &weights_path, read_file(&weights_path, advice)?)?;
        Ok(Self { method, base_model, tensors })
    }

    /// Writes the adapter into a directory, which is made if need be. The same adapter gives the same bytes.
    ///
    /// `modules` are the base model's: what is written is checked against them first, so that no adapter is saved that could not be loaded.
    ///
    /// # Errors
    /// What [`Method::check_file`] finds; what the system refuses. The files that were there before are untouched then, unless a rename itself failed.
    pub fn write(&self, dir: &Path, modules: &BaseModules<'_>) -> Result<(), Error> {
        self.method.check_file(self, modules)?;
        let (config_path, weights_path) = (dir.join(CONFIG_FILE), dir.join(WEIGHTS_FILE));
        let config = peft_config::to_json(&*self.method, self.base_model.as_deref(), modules)?;
        fs::create_dir_all(dir).map_err(io_error("create", dir))?;
        let weights = safetensors::stage(&weights_path, &[("format", "pt")], &self.written_tensors())?;
        let config_staged = Staged::new(&config_path, config.as_bytes())?;
        // An older configuration must not stand beside the new weights, not even if the machine stops between the two renames.
        if fs::read(&config_path).is_ok_and(|old| old != config.as_bytes()) {
            fs::remove_file(&config_path).map_err(io_error("replace", &config_path))?;
        }
        weights.commit()?;
        Ok(config_staged.commit()?)
    }

    /// Lowers an adapter that exists already, as PEFT takes it: entries of its configuration that match nothing are passed over.
    ///
    /// # Errors
    /// An adapter that does not fit the model.
    pub fn lower(&self, spec: &ModelSpec) -> Result<Overlay, Error> {
        self.method.check_file(self, &BaseModules::of(spec))?;
        self.method.lower(spec, false)
    }

    /// The same for training it further.
    ///
    /// # Errors
    /// An adapter that does not fit the model, or cannot be trained.
    pub fn lower_for_training(&self, spec: &ModelSpec) -> Result<Overlay, Error> {
        let overlay = self.lower(spec)?;
        self.method.check_trainable(spec)?;
        Ok(overlay)
    }

    /// The flat vector of an overlay that holds this adapter's tensors.
    ///
    /// # Errors
    /// A trainable tensor that is missing or of another shape, or a tensor that belongs to nothing.
    pub fn params(&self, overlay: &Overlay) -> Result<Vec<f32>, Error> {
        let mut held = Vec::new();
        for param in overlay.layout.params() {
            let Some((shape, values)) = self.tensors.get(&param.name) else {
                return Err(Error::TensorMissing { name: param.name.clone() });
            };
            if *shape != param.shape {
                let (name, found) = (param.name.clone(), shape.clone());
                return Err(Error::TensorShape { name, found, expected: param.shape.clone() });
            }
            held.push((param, values));
        }
        // Only now: what a configuration asks for may be far larger than what its file holds.
        let mut params = vec![0.0; overlay.layout.len()];
        held.into_iter().for_each(|(param, values)| param.read_file(values, &mut params));
        // PEFT saves the base's own weight beside an adapted head; it is not the adapter's.
        let is_base_weight = |name: &str| matches!(names::parse(name), Key::Part(_, Part::BaseWeight));
        let belongs = |name: &str| overlay.layout.find(name).is_some() || is_base_weight(name);
        match self.tensors.keys().find(|name| !belongs(name)) {
            Some(name) => Err(Error::TensorUnknown { name: name.clone() }),
            None => Ok(params),
        }
    }

    /// Holds the base's own weights, which PEFT saves beside an adapted head or embedding and loads over the base's, against the base: what
    /// is quantized may differ, another table may not.
    ///
    /// # Errors
    /// A weight that is not the base's.
    pub fn check_base_weights<W: Weights>(&self, base: &W) -> Result<(), Error>
    where
        W::Error: std::fmt::Display,
    {
        for (key, (_, values)) in &self.tensors {
            let Key::Part(module, Part::BaseWeight) = names::parse(key) else { continue };
            let Ok(matrix) = base.tensor(&format!("{module}.weight")) else { continue };
            let ours = matrix.to_f32();
            let norm: f64 = ours.iter().map(|&v| f64::from(v).powi(2)).sum();
            let difference: f64 = ours.iter().zip(values).map(|(&a, &b)| f64::from(a - b).powi(2)).sum();
            if ours.len() != values.len() || difference > QUANTIZED.powi(2) * norm {
                return Err(Error::OtherBaseWeight { name: key.clone(), module });
            }
        }
        Ok(())
    }

    /// The tensors of the file. The base's own weight of an adapted head is the base's to keep.
    fn written_tensors(&self) -> Vec<Tensor<'_>> {
        let is_written = |key: &str| !matches!(names::parse(key), Key::Part(_, Part::BaseWeight));
        let tensors = self.tensors.iter().filter(|(key, _)| is_written(key));
        tensors.map(|(name, (shape, values))| Tensor { name, shape, values: Values::F32(values) }).collect()
    }
}

fn read_file(path: &Path, advice: &'static str) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::MissingFile { path: path.to_owned(), advice },
        _ => io_error("read", path)(error).into(),
    })
}

/// Shape and values of tensors by name; values row-major.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn read_tensors(method: &dyn Method, path: &Path, bytes: Vec<u8>) -> Result<Tensors, Error> {
    let file = safetensors::parse(&SharedBytes::from_vec(bytes)).map_err(|error| damaged(path, error))?;
    let keys: Vec<&str> = file.keys().map(String::as_str).collect();
    let mut tensors = Tensors::new();
    let mut spelled: BTreeMap<String, &str> = BTreeMap::new();
    for ((key, raw), name) in file.iter().zip(method.spell(&keys)) {
        let Some(name) = name else { continue };
        if let Some(first) = spelled.insert(name.clone(), key) {
            return Err(Error::DuplicateTensor {
                path: path.to_owned(),
                first: first.to_owned(),
                second: key.to_owned(),
            });
        }
        let values = raw.to_f32(key).map_err(|_| Error::TensorType {
            path: path.to_owned(),
            name: key.to_owned(),
            found: raw.dtype.to_string(),
        })?;
        tensors.insert(name, (raw.shape.clone(), values));
    }
    Ok(tensors)
}

/// The tensors of a flat vector (of parameters or of gradients) by name, as files hold them.
pub fn tensors_of(overlay: &Overlay, flat: &[f32]) -> Tensors {
    let params = overlay.layout.params().iter();
    params.map(|param| (param.name.clone(), (param.shape.clone(), param.to_file(flat)))).collect()
}

fn damaged(path: &Path, error: retune_formats::Error) -> Error {
    use retune_formats::Error::{SafetensorsHeader, Truncated};
    let reason = match error {
        SafetensorsHeader { reason } => reason,
        Truncated { what, needs, has } => format!("{what} ends at byte {needs}, but the file has {has} bytes"),
        other => other.to_string(),
    };
    Error::Safetensors { path: path.to_owned(), reason }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::LoraConfig;
    use crate::names::trained_biases;
    use crate::targets::{resolve, select};
    use crate::test_model::{tiny_llama, tiny_llama_with_biases};
    use ::safetensors::SafeTensors;
    use retune_kernels::random;
    use serde_json::{Value, json};

    /// An adapter with a value in every tensor that its configuration asks for.
    pub(crate) fn adapter(config: Value, modules: &BaseModules<'_>) -> AdapterFile {
        let config: LoraConfig = serde_json::from_value(config).unwrap();
        let targets = resolve(&config, modules).unwrap();
        let mut tensors = Tensors::new();
        let mut put = |key: String, shape: Vec<usize>| {
            let n: usize = shape.iter().product();
            let word = random::hash(&key);
            let values = (0..n).map(|i| random::symmetric(random::at(word, i as u64))).collect();
            tensors.insert(key, (shape, values));
        };
        for target in &targets {
            put(names::lora_a(&target.module), vec![target.r, target.in_features]);
            put(names::lora_b(&target.module), vec![target.out_features, target.r]);
        }
        for bias in trained_biases(&config, modules, &targets) {
            put(bias.key, vec![bias.len]);
        }
        AdapterFile { method: Arc::new(config), base_model: Some("some/base".to_owned()), tensors }
    }

    /// The settings of a LoRA adapter.
    pub(crate) fn lora(file: &AdapterFile) -> LoraConfig {
        serde_json::from_value(file.method.settings().unwrap()).unwrap()
    }

    /// What makes two adapters the same.
    fn parts(file: &AdapterFile) -> (LoraConfig, &Option<String>, &Tensors) {
        (lora(file), &file.base_model, &file.tensors)
    }

    fn small() -> AdapterFile {
        adapter(json!({"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}), &tiny_llama())
    }

    /// Bytes of a safetensors file with this header and this much data.
    fn raw(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    /// What reading says of a directory with these bytes as its weights.
    fn read_weights(bytes: &[u8]) -> Result<AdapterFile, Error> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG_FILE), r#"{"peft_type": "LORA", "target_modules": ["q_proj"]}"#).unwrap();
        fs::write(dir.path().join(WEIGHTS_FILE), bytes).unwrap();
        AdapterFile::read(dir.path())
    }

    #[test]
    fn what_is_written_is_read_back() {
        let biased = tiny_llama_with_biases();
        for (config, modules) in [
            (json!({"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}), tiny_llama()),
            (
                json!({"target_modules": ["q_proj"], "bias": "all", "use_rslora": true, "lora_dropout": 0.05}),
                biased.clone(),
            ),
            (json!({"target_modules": ["q_proj"], "bias": "lora_only", "layers_to_transform": 1}), biased),
            (
                json!({"target_modules": ".*_proj", "rank_pattern": {"v_proj": 2, ".*": 3}, "alpha_pattern": {"k_proj": 0.5}}),
                tiny_llama(),
            ),
        ] {
            let file = adapter(config, &modules);
            let dir = tempfile::tempdir().unwrap();
            let inside = dir.path().join("a/b");
            file.write(&inside, &modules).unwrap();
            assert_eq!(parts(&AdapterFile::read(&inside).unwrap()), parts(&file));
        }
    }

    #[test]
    fn all_linear_is_written_as_names_and_selects_the_same() {
        let file = adapter(json!({"r": 2}), &tiny_llama());
        let dir = tempfile::tempdir().unwrap();
        file.write(dir.path(), &tiny_llama()).unwrap();
        let read = AdapterFile::read(dir.path()).unwrap();
        assert_eq!(read.tensors, file.tensors);
        assert!(!lora(&read).target_modules.is_all_linear());
        assert_eq!(select(&lora(&read), &tiny_llama()).unwrap(), select(&lora(&file), &tiny_llama()).unwrap());
    }

    #[test]
    fn the_same_adapter_gives_the_same_bytes_and_no_other_file() {
        let written = || {
            let dir = tempfile::tempdir().unwrap();
            small().write(dir.path(), &tiny_llama()).unwrap();
            let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            assert_eq!(names, [CONFIG_FILE, WEIGHTS_FILE]);
            (fs::read(dir.path().join(CONFIG_FILE)).unwrap(), fs::read(dir.path().join(WEIGHTS_FILE)).unwrap())
        };
        let (config, weights) = written();
        assert_eq!((config.clone(), weights.clone()), written());
        assert!(
            String::from_utf8(config)
                .unwrap()
                .starts_with("{\n  \"base_model_name_or_path\": \"some/base\",\n  \"bias\": \"none\"")
        );
        assert_eq!(SafeTensors::read_metadata(&weights).unwrap().1.metadata().as_ref().unwrap()["format"], "pt");
    }

    #[test]
    fn the_copy_of_the_head_is_not_written_again() {
        let mut file = adapter(json!({"target_modules": ["lm_head"], "r": 4}), &tiny_llama());
        let key = Part::BaseWeight.key("lm_head");
        file.tensors.insert(key.clone(), (vec![64, 32], vec![0.0; 64 * 32]));
        let dir = tempfile::tempdir().unwrap();
        file.write(dir.path(), &tiny_llama()).unwrap();
        let read = AdapterFile::read(dir.path()).unwrap();
        assert_eq!(read.tensors.len(), 2);
        assert!(!read.tensors.contains_key(&key));
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_adapter_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let old = small();
        old.write(dir.path(), &tiny_llama()).unwrap();
        let mut new = old.clone();
        new.method = Arc::new(LoraConfig { lora_alpha: 64.0, ..lora(&new) });
        let mut broken = new.clone();
        broken.tensors.values_mut().next().unwrap().1[0] = f32::NAN;
        assert!(matches!(broken.write(dir.path(), &tiny_llama()), Err(Error::NotFinite { .. })));
        assert_eq!(parts(&AdapterFile::read(dir.path()).unwrap()), parts(&old));
        // No temporary file can be made: the disk is as good as full.
        let staged = dir.path().join(format!(".{CONFIG_FILE}.tmp"));
        fs::create_dir(&staged).unwrap();
        assert!(matches!(new.write(dir.path(), &tiny_llama()), Err(Error::Formats(retune_formats::Error::Io { .. }))));
        assert_eq!(parts(&AdapterFile::read(dir.path()).unwrap()), parts(&old));
        // What an interrupted write has left behind is in nobody's way.
        fs::remove_dir(&staged).unwrap();
        fs::write(&staged, "{\"half").unwrap();
        new.write(dir.path(), &tiny_llama()).unwrap();
        assert_eq!(parts(&AdapterFile::read(dir.path()).unwrap()), parts(&new));
        assert!(!staged.exists());
    }

    #[test]
    fn a_reader_never_meets_half_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let versions = [0.25f32, 0.75].map(|value| {
            let mut file = small();
            for (_, values) in file.tensors.values_mut() {
                values.fill(value);
            }
            file
        });
        versions[0].write(dir.path(), &tiny_llama()).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for i in 0..20 {
                    versions[i % 2].write(dir.path(), &tiny_llama()).unwrap();
                }
            });
            while !writer.is_finished() {
                let read = AdapterFile::read(dir.path()).unwrap();
                assert!(versions.iter().any(|version| parts(version) == parts(&read)));
            }
        });
    }

    #[test]
    fn half_precision_is_read() {
        let header = r#"{"a.q_proj.lora_A.weight":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]},"a.q_proj.lora_B.weight":{"dtype":"BF16","shape":[1,1],"data_offsets":[4,6]}}"#;
        let mut data = Vec::new();
        data.extend(half::f16::from_f32(1.5).to_le_bytes());
        data.extend(half::f16::from_f32(-0.25).to_le_bytes());
        data.extend(half::bf16::from_f32(3.0).to_le_bytes());
        let file = read_weights(&raw(header, &data)).unwrap();
        assert_eq!(file.tensors["base_model.model.a.q_proj.lora_A.weight"], (vec![1, 2], vec![1.5, -0.25]));
        assert_eq!(file.tensors["base_model.model.a.q_proj.lora_B.weight"], (vec![1, 1], vec![3.0]));
        assert_eq!((lora(&file).r, lora(&file).lora_alpha), (8, 8.0));
    }

    #[test]
    fn spellings_become_one_and_a_bias_knows_its_module() {
        let tensor = |name: &str, start: usize| {
            format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":[{start},{}]}}"#, start + 4)
        };
        let header = format!(
            "{{{},{},{},{}}}",
            tensor("base_model.model.a.q.lora_A.default.weight", 0),
            tensor("base_model.model.a.q.bias", 4),
            tensor("base_model.model.a.k.bias", 8),
            tensor("base_model.model.a.o.original_module.bias", 12),
        );
        let file = read_weights(&raw(&header, &[0; 16])).unwrap();
        let keys: Vec<&str> = file.tensors.keys().map(String::as_str).collect();
        let expected =
            ["base_model.model.a.k.bias", "base_model.model.a.q.base_layer.bias", "base_model.model.a.q.lora_A.weight"];
        assert_eq!(keys, expected);
        let twice = format!("{{{},{}}}", tensor("a.q.lora_A.one.weight", 0), tensor("a.q.lora_A.two.weight", 4));
        let message = read_weights(&raw(&twice, &[0; 8])).unwrap_err().to_string();
        assert!(message.contains("`a.q.lora_A.one.weight` and `a.q.lora_A.two.weight`"), "{message}");
    }

    #[test]
    fn damaged_weights_are_errors_and_never_panics() {
        let one = |shape: &str, offsets: &str| {
            format!(r#"{{"x.weight":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let huge = format!(
            r#"{{"x":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}},"y":{{"dtype":"U8","shape":[{0}],"data_offsets":[{0},{1}]}}}}"#,
            u64::MAX / 8,
            u64::MAX / 8 * 2
        );
        for bytes in [
            vec![],
            vec![1, 2, 3],
            vec![0xff; 8],
            vec![0xff; 64],
            raw("", b""),
            raw("{", b""),
            raw("[]", b""),
            raw("{\"x\": 3}", b""),
            raw("\u{0}", b""),
            raw(&one("[1]", "[0,4]"), &[0; 3]),
            raw(&one("[1]", "[0,4]"), &[0; 5]),
            raw(&one("[2]", "[0,4]"), &[0; 4]),
            raw(&one("[1]", "[4,0]"), &[0; 4]),
            raw(&one("[1]", "[1,5]"), &[0; 5]),
            raw(&one("[-1]", "[0,4]"), &[0; 4]),
            raw(&one("[4611686018427387904,4]", "[0,4]"), &[0; 4]),
            raw(&one("[1]", "[0,18446744073709551615]"), &[0; 4]),
            raw(&huge, &[0; 4]),
        ] {
            let error = read_weights(&bytes).unwrap_err();
            assert!(matches!(error, Error::Safetensors { .. }), "{bytes:?}: {error}");
        }
        let integers = raw(r#"{"x.weight":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#, &[0; 8]);
        let message = read_weights(&integers).unwrap_err().to_string();
        assert!(message.contains("`x.weight` is of type I64"), "{message}");
    }

    #[test]
    fn a_file_with_any_byte_changed_or_cut_never_panics() {
        let dir = tempfile::tempdir().unwrap();
        adapter(json!({"target_modules": ["0.self_attn.q_proj"], "r": 1}), &tiny_llama())
            .write(dir.path(), &tiny_llama())
            .unwrap();
        let whole = fs::read(dir.path().join(WEIGHTS_FILE)).unwrap();
        let path = Path::new("test");
        for i in 0..whole.len() {
            assert!(read_tensors(&LoraConfig::default(), path, whole[..i].to_vec()).is_err());
            for flip in [1u8, 0x10, 0x80] {
                let mut changed = whole.clone();
                changed[i] ^= flip;
                if let Ok(tensors) = read_tensors(&LoraConfig::default(), path, changed) {
                    let file = AdapterFile { method: Arc::new(LoraConfig::default()), base_model: None, tensors };
                    assert!(file.method.check_file(&file, &tiny_llama()).is_err());
                }
            }
        }
    }

    #[test]
    fn absent_and_unreadable_files_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let says = |expected: &str| {
            let message = AdapterFile::read(dir.path()).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        says("adapter_config.json does not exist");
        fs::write(dir.path().join(CONFIG_FILE), "{\"peft_type\": ").unwrap();
        says("is not valid JSON");
        says("Copy or save the adapter again");
        fs::write(dir.path().join(CONFIG_FILE), "[".repeat(100_000)).unwrap();
        says("is not valid JSON");
        fs::write(dir.path().join(CONFIG_FILE), r#"{"peft_type": "LORA", "target_modules": ["q_proj"]}"#).unwrap();
        says("adapter_model.safetensors does not exist. The directory has a configuration");
        fs::write(dir.path().join("adapter_model.bin"), "").unwrap();
        says("safe_serialization");
        fs::create_dir(dir.path().join(WEIGHTS_FILE)).unwrap();
        says("cannot read");
    }
}
