//! Writing a model as a GGUF file, for llama.cpp and what is built on it.
//!
//! Rows are ordered, and norms kept, as llama.cpp's converter does. Of a model that is a GGUF file itself the header is copied, and tensors
//! that stay as they are and keep their type are copied byte for byte. The file gets its name when it has been read back and describes the
//! same model.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use retune_engine::overlay::Overlay;
use retune_engine::spec::{Mix, ModelSpec, Module, NormKind};
use retune_formats::atomic::Draft;
use retune_formats::gguf::TensorInfo;
use retune_formats::gguf::write::{Entry, Linears, Stored, padding};
use retune_quant::{Format, Matrix};

use super::{
    Arranged, Edit, Edits, ExportType, MergeReport, Tensor, TensorWriter, edits, gguf_header, refuse_unmergeable,
    unties, weight_of,
};
use crate::checkpoint::{Checkpoint, row_maps};
use crate::error::Error;
use crate::translate::Gguf;

/// Learned positions, which llama.cpp adds as they are.
const POSITIONS: &str = "position_embd.weight";

/// The type of most tensors of a GGUF file.
///
/// As with llama.cpp's quantizer, vectors are F32; the head is Q6_K where the other matrices have fewer bits; and matrices whose rows are no
/// whole blocks get the nearest type with more bits whose blocks fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum GgufType {
    F32,
    F16,
    #[cfg_attr(feature = "clap", value(name = "bf16"))]
    BF16,
    #[cfg_attr(feature = "clap", value(name = "q8_0"))]
    Q8_0,
    #[cfg_attr(feature = "clap", value(name = "q6_k"))]
    Q6K,
    #[cfg_attr(feature = "clap", value(name = "q5_k"))]
    Q5K,
    #[cfg_attr(feature = "clap", value(name = "q4_k"))]
    Q4K,
    #[cfg_attr(feature = "clap", value(name = "q4_1"))]
    Q4_1,
    #[cfg_attr(feature = "clap", value(name = "q4_0"))]
    Q4_0,
}

impl GgufType {
    /// The one that keeps a model's weights nearly as they are: bf16 where they are stored so, f16 elsewhere.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        match ExportType::of(checkpoint) {
            Ok(ExportType::BF16) => Self::BF16,
            _ => Self::F16,
        }
    }

    /// The type of its matrices, and its number in `general.file_type`.
    fn facts(self) -> (Format, u32) {
        match self {
            Self::F32 => (Format::F32, 0),
            Self::F16 => (Format::F16, 1),
            Self::BF16 => (Format::BF16, 32),
            Self::Q8_0 => (Format::Q8_0, 7),
            Self::Q6K => (Format::Q6K, 18),
            Self::Q5K => (Format::Q5K, 16),
            Self::Q4K => (Format::Q4K, 14),
            Self::Q4_1 => (Format::Q4_1, 3),
            Self::Q4_0 => (Format::Q4_0, 2),
        }
    }

    /// The type of a tensor, by its name in llama.cpp.
    fn format(self, name: &str, shape: &[usize], is_head: bool) -> Format {
        let &[_, cols] = shape else { return Format::F32 };
        if name == POSITIONS {
            return Format::F32;
        }
        let format = match self.facts().0 {
            Format::Q4_0 | Format::Q4_1 | Format::Q4K | Format::Q5K if is_head => Format::Q6K,
            format => format,
        };
        let in_blocks_of_32 = match format {
            Format::Q4K => Format::Q5_0,
            Format::Q5K => Format::Q5_1,
            Format::Q6K => Format::Q8_0,
            format => format,
        };
        let fits = |format: &Format| cols.is_multiple_of(format.block_len());
        [format, in_blocks_of_32].into_iter().find(fits).unwrap_or(Format::F16)
    }
}

impl fmt::Display for GgufType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.facts().0.name().to_lowercase())
    }
}

/// A GGUF file that was written.
#[derive(Clone, Debug)]
pub struct WrittenGguf {
    pub report: MergeReport,
    /// What llama.cpp will do otherwise.
    pub notes: Vec<String>,
}

/// Writes a model with what stands on it merged into its weights as one GGUF file. The same input gives the same bytes. `progress` is told the
/// bytes of weights written so far, and how many there will be.
///
/// # Errors
/// As [`super::write`]; a family, a tokenizer or a setting that llama.cpp's files do not know. Nothing is left behind then.
pub fn write_gguf(
    checkpoint: &Checkpoint,
    overlay: &Overlay,
    params: &[f32],
    path: &Path,
    kind: GgufType,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<WrittenGguf, Error> {
    let spec = &checkpoint.spec;
    refuse_unmergeable(spec, overlay)?;
    let gguf = gguf_of(checkpoint)?;
    let tied = spec.head.tied && !unties(spec, overlay);
    if !tied && ["gemma", "gemma2"].contains(&gguf.architecture) {
        let what =
            format!("its head is another matrix than its table, and llama.cpp has none in {} models", spec.family);
        return Err(Error::NoGguf { what });
    }
    let edits = edits(checkpoint, overlay, params)?;
    let tensors = Plan { checkpoint, gguf, kind, tied, edits: &edits }.tensors()?;
    let mut header = gguf_header::of(checkpoint, gguf)?;
    header.set("general.file_type", Entry::U32(kind.facts().1));
    header.set("general.quantization_version", Entry::U32(2));
    for tensor in &tensors {
        header.tensor(&tensor.name, &tensor.shape, tensor.format);
    }

    let mut writer = TensorWriter::new(tensors.iter().map(Tensor::bytes).sum(), progress);
    let header = header.bytes();
    writer.header_bytes = header.len() as u64;
    let mut draft = Draft::create(path)?;
    draft.write_all(&header)?;
    for tensor in &tensors {
        writer.write(tensor, &mut draft)?;
        draft.write_all(padding(tensor.bytes()))?;
    }
    let staged = draft.finish()?;
    let notes = compare(spec, &Checkpoint::open(staged.temporary())?.spec)?;
    staged.commit()?;
    Ok(WrittenGguf { report: writer.report(1), notes })
}

/// What is to be written.
struct Plan<'a, 'b> {
    checkpoint: &'b Checkpoint,
    gguf: &'static Gguf,
    kind: GgufType,
    tied: bool,
    edits: &'b Edits<'a>,
}

impl<'a> Plan<'a, '_> {
    /// The tensors, in the order of the source's file or of the forward.
    fn tensors(&self) -> Result<Vec<Tensor<'a>>, Error> {
        let spec = &self.checkpoint.spec;
        let maps = row_maps(spec, self.gguf.paired_rows);
        let mut modules = spec.modules();
        if spec.head.tied && !self.tied {
            modules.push(Module::Linear(&spec.head.linear));
        }
        let mut tensors = self.factors()?;
        for module in modules {
            for (name, shape) in module.tensors() {
                tensors.push(self.tensor(&module, &name, shape, maps.get(module.name()))?);
            }
        }
        let places: BTreeMap<&str, usize> = self.checkpoint.gguf_names().zip(0..).collect();
        tensors.sort_by_key(|tensor| places.get(tensor.name.as_str()).copied().unwrap_or(usize::MAX));
        Ok(tensors)
    }

    fn tensor(
        &self,
        module: &Module<'_>,
        name: &str,
        shape: Vec<usize>,
        rows: Option<&Arc<[u32]>>,
    ) -> Result<Tensor<'a>, Error> {
        let spec = &self.checkpoint.spec;
        let (table, head) = (weight_of(&spec.table.name), weight_of(&spec.head.linear.name));
        let source = if name == head && spec.head.tied { &table } else { name };
        let base = self.checkpoint.tensor(source)?;
        let Some(stored) = self.gguf.name(self.checkpoint.family.prefix, name) else {
            return Err(Error::NoGguf { what: format!("llama.cpp has no name for {name}") });
        };
        // llama.cpp stores every linear as [out, in].
        let shape = if shape.len() == 2 { vec![base.rows(), base.cols()] } else { shape };
        let is_head = name == head || (self.tied && name == table);
        let format = self.kind.format(&stored, &shape, is_head);
        let edit = self.edits.get(name).cloned().unwrap_or(Edit::Nothing);
        let arranged = match (self.checkpoint.gguf_bytes(source, format), rows, module) {
            (Some(bytes), ..) if matches!(edit, Edit::Nothing) => Arranged::AsStored(bytes),
            (_, Some(rows), _) => Arranged::Rows(Arc::clone(rows)),
            (.., Module::Norm(norm)) if norm.kind == NormKind::RmsPlusOne => Arranged::PlusOne,
            _ => Arranged::Plainly,
        };
        Ok(Tensor { module: module.name().to_owned(), name: stored, shape, base, edit, format, arranged })
    }

    /// The factors on the rotation, which are tensors in a GGUF file: the source's own, or what its configuration says.
    fn factors(&self) -> Result<Vec<Tensor<'a>>, Error> {
        let tensor = |name: &str, shape: Vec<usize>, format: Format, base: Matrix, arranged: Arranged| {
            let (module, name, edit) = (String::new(), name.to_owned(), Edit::Nothing);
            Tensor { module, name, shape, base, edit, format, arranged }
        };
        let Some(stored) = self.checkpoint.gguf_factors() else {
            let factors = gguf_header::factors(self.checkpoint)?.into_iter();
            let of = |(name, values): (&str, Vec<f32>)| {
                let base = Matrix::from_f32(1, values.len(), values);
                tensor(name, vec![base.cols()], Format::F32, base, Arranged::Plainly)
            };
            return Ok(factors.map(of).collect());
        };
        let of = |info: &TensorInfo| {
            let values = info.dims.iter().product();
            let base = Matrix::new(info.format, 1, values, info.bytes.clone())
                .map_err(|error| Error::Tensor { tensor: info.name.clone(), error })?;
            Ok(tensor(&info.name, info.shape(), info.format, base, Arranged::AsStored(info.bytes.clone())))
        };
        stored.into_iter().map(of).collect()
    }
}

/// How far two numbers of a configuration may lie apart of which one was written as f32.
const ROUNDED: f64 = 1e-5;

/// Holds a model against what its GGUF file describes: what is to be said of it.
///
/// # Errors
/// What would be another model in programs that read the file.
fn compare(ours: &ModelSpec, read: &ModelSpec) -> Result<Vec<String>, Error> {
    let refuse = |what: String| Err(Error::NoGguf { what });
    let close = |a: f64, b: f64| a == b || (a / b - 1.0).abs() < ROUNDED;
    let mut windows = Vec::new();
    for (place, (a, b)) in ours.sub_layers().zip(read.sub_layers()).enumerate() {
        if !close(a.norm.eps.into(), b.norm.eps.into()) {
            return refuse(format!("its norms add {}, which is read as {}", a.norm.eps, b.norm.eps));
        }
        match (&a.mix, &b.mix) {
            (Mix::Attention(a), Mix::Attention(b)) => {
                if !close(a.scale.into(), b.scale.into()) {
                    let (ours, read) = (a.scale, b.scale);
                    return refuse(format!("it multiplies attention's scores by {ours}, and llama.cpp by {read}"));
                }
                if (a.soft_cap, a.query_scale, a.positions, a.head_dim, a.keys)
                    != (b.soft_cap, b.query_scale, b.positions, b.head_dim, b.keys)
                {
                    return refuse(format!("the attention of layer {} is read as another", place / 2));
                }
                if a.window != b.window {
                    windows.extend(a.window);
                }
            }
            (a, b) if a != b => return refuse(format!("it computes {a:?}, and llama.cpp {b:?}")),
            _ => {}
        }
    }
    if ours.head.soft_cap != read.head.soft_cap {
        return refuse("its logits are capped, which a file of this family does not say".to_owned());
    }
    let all_close = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(&a, &b)| close(a, b));
    for (a, b) in ours.ropes.iter().zip(&read.ropes) {
        // Short rows and long ones, where these differ.
        let is_equal = |length: usize| all_close(&a.frequencies_at(length), &b.frequencies_at(length));
        if !is_equal(1) || !is_equal(ours.context.max(1)) || !close(a.factor.into(), b.factor.into()) {
            return refuse("its rotary scaling is none that a file of this family can say".to_owned());
        }
    }
    let note = windows.iter().min().map(|window| {
        format!(
            "{} of its attentions see {window} tokens, which a GGUF file of this family does not say: llama.cpp computes longer texts otherwise",
            windows.len()
        )
    });
    Ok(note.into_iter().collect())
}

/// The linears of a model as GGUF files of it have them. A head that is the table is not among them.
///
/// # Errors
/// A family that llama.cpp does not know.
pub fn gguf_linears(checkpoint: &Checkpoint) -> Result<Linears, Error> {
    let spec = &checkpoint.spec;
    let gguf = gguf_of(checkpoint)?;
    let maps = row_maps(spec, gguf.paired_rows);
    let is_table = |name: &str| spec.head.tied && name == spec.head.linear.name;
    let linears = spec.linears().filter(|linear| !is_table(&linear.name)).filter_map(|linear| {
        let weight = gguf.name(checkpoint.family.prefix, &weight_of(&linear.name))?;
        Some((linear.name.clone(), Stored { weight, rows: maps.get(linear.name.as_str()).cloned() }))
    });
    Ok(Linears { architecture: gguf_header::architecture(checkpoint, gguf)?, linears: linears.collect() })
}

fn gguf_of(checkpoint: &Checkpoint) -> Result<&'static Gguf, Error> {
    let family = checkpoint.spec.family;
    let none = || Error::NoGguf { what: format!("its family, {family}, is none that is written so") };
    checkpoint.family.gguf.as_ref().ok_or_else(none)
}
