//! `retune logits`: logits, loss and gradients of given tokens, for comparing with other software.

use anyhow::{Result, bail};
use retune_formats::safetensors::{Tensor, Values, stage};
use std::collections::BTreeMap;

use retune_adapter::tensors_of;
use retune_engine::pass::Pass;
use retune_engine::row_norms::RowNorms;
use retune_engine::workspace::Workspace;
use retune_engine::{Run, Saving};
use retune_train::run_config::Int8Copy;

use crate::args::LogitsArgs;
use crate::output::{refuse_missing_folder, refuse_source};
use crate::session::Session;
use crate::{compute, memory};

/// Writes `logits` [T, V]; with labels also `loss` [1], and with an adapter the gradient of that loss by each of its tensors.
pub fn run(args: &LogitsArgs) -> Result<()> {
    refuse_missing_folder(&args.out)?;
    let Session { model, overlay, params, base } = Session::open(&args.model)?;
    let sources = [Some(base.checkpoint.path()), args.model.adapter.as_deref()];
    refuse_source(&args.out, &sources.into_iter().flatten().collect::<Vec<_>>())?;
    let vocab = model.spec.vocab_size;
    if let Some(id) = args.tokens.iter().find(|&&id| id as usize >= vocab) {
        bail!("token {id} is outside the model's vocabulary of {vocab}");
    }
    if let Some(most) = overlay.most_tokens(&model.spec).filter(|&most| args.tokens.len() > most) {
        bail!("{} tokens, and the model has learned positions for {most}: give at most that many", args.tokens.len());
    }
    let mut pass = Pass::new(overlay.prelude(&model.spec), false);
    if model.spec.encoder.is_some() {
        let pad = base.checkpoint.tokens.pad.unwrap_or(0);
        let (ids, trained) = targets(args.labels.as_deref(), vocab, pad)?;
        pass.push_answer(0, &args.tokens, &ids, &trained);
    } else {
        let trained = match &args.labels {
            Some(labels) => trained(&args.tokens, labels)?,
            None => vec![false; args.tokens.len()],
        };
        pass.push(0, &args.tokens, &trained);
    }
    let backward = args.labels.is_some();
    let integers =
        compute::integers(&model, &overlay, Int8Copy::Auto, base.checkpoint.held_bytes() as usize, memory::available());
    let (compute, _) = compute::choose(&model, &overlay, &params, args.compute, integers, &pass, backward);
    let norms = RowNorms::of(&model, &overlay, &params);
    let run = Run {
        model: &model,
        overlay: &overlay,
        params: &params,
        norms: &norms,
        compute: &compute,
        pass: &pass,
        step: None,
        parts: &[],
    };
    let mut workspace = Workspace::new(&model, Saving::Full);
    let all: Vec<u32> = pass.sequences.iter().flat_map(|sequence| pass.tokens_of(sequence)).collect();
    let logits = run.logits(&all, &mut workspace);
    let mut tensors = BTreeMap::from([("logits".to_owned(), (vec![all.len(), vocab], logits))]);
    if args.labels.is_some() {
        let mut grads = vec![0.0; params.len()];
        let loss = run.loss_and_gradient(&mut grads, &mut workspace);
        let count = pass.labels.len() as f64;
        grads.iter_mut().for_each(|g| *g = (f64::from(*g) / count) as f32);
        tensors.extend(tensors_of(&overlay, &grads));
        tensors.insert("loss".to_owned(), (vec![1], vec![(loss / count) as f32]));
        outln!("loss {:.6} over {} label tokens", loss / count, pass.labels.len());
    }
    write(&args.out, &tensors)?;
    outln!("wrote {} tensors to {}", tensors.len(), args.out.display());
    Ok(())
}

/// The ids that a decoder beside an encoder reads after its start, and which of them are targets: the labels, with padding where they are
/// -100, as in transformers.
fn targets(labels: Option<&[i64]>, vocab: usize, pad: u32) -> Result<(Vec<u32>, Vec<bool>)> {
    let Some(labels) = labels else {
        bail!(
            "the model's encoder reads --tokens and its decoder --labels, which are missing: give the ids of the answer"
        );
    };
    let id = |&label: &i64| match u32::try_from(label) {
        Ok(id) if (id as usize) < vocab => Ok(id),
        _ if label == -100 => Ok(pad),
        _ => bail!("label {label} is outside the model's vocabulary of {vocab}; expected an id of it or -100"),
    };
    let ids = labels.iter().map(id).collect::<Result<_>>()?;
    let trained: Vec<bool> = labels.iter().map(|&label| label != -100).collect();
    if !trained.contains(&true) {
        bail!("the labels leave nothing to predict: all are -100; give the ids of the answer");
    }
    Ok((ids, trained))
}

/// Which tokens are targets: those whose label is not -100; at least one that is predicted.
fn trained(tokens: &[u32], labels: &[i64]) -> Result<Vec<bool>> {
    if labels.len() != tokens.len() {
        bail!(
            "{} labels for {} tokens: give one for each token, -100 where it is not trained",
            labels.len(),
            tokens.len()
        );
    }
    let check = |(i, (&label, &token)): (usize, (&i64, &u32))| match label {
        -100 => Ok(false),
        label if label == i64::from(token) => Ok(true),
        _ => bail!(
            "label {i} is {label}; expected the token itself ({token}) or -100: labels are shifted inside, as in transformers"
        ),
    };
    let trained: Vec<bool> = labels.iter().zip(tokens).enumerate().map(check).collect::<Result<_>>()?;
    if !trained.iter().skip(1).any(|&trained| trained) {
        bail!(
            "the labels leave nothing to predict: those after token 0 are all -100, and token 0 is never predicted, since nothing stands \
             before it; give a later token its own id as its label"
        );
    }
    Ok(trained)
}

/// Writes named f32 tensors as a safetensors file.
pub fn write(path: &std::path::Path, tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>) -> Result<()> {
    let tensors: Vec<Tensor<'_>> =
        tensors.iter().map(|(name, (shape, values))| Tensor { name, shape, values: Values::F32(values) }).collect();
    Ok(stage(path, &[("format", "pt")], &tensors)?.commit()?)
}
