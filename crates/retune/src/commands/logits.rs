//! `retune logits`: logits, loss and gradients of given tokens, for comparing with other software.

use anyhow::{Result, bail};
use retune_formats::safetensors::{Tensor, Values, stage};
use retune_model::adapter::Tensors;
use retune_model::pass::Pass;
use retune_model::workspace::{Keep, Workspace};

use crate::args::LogitsArgs;
use crate::compute;
use crate::session::Session;

/// Writes `logits` [T, V]; with labels also `loss` [1], and with an adapter the gradient of that loss by each of its tensors.
pub fn run(args: &LogitsArgs) -> Result<()> {
    let Session { mut model, params, .. } = Session::open(&args.model)?;
    let vocab = model.config.vocab_size;
    if let Some(id) = args.tokens.iter().find(|&&id| id as usize >= vocab) {
        bail!("token {id} is outside the model's vocabulary of {vocab}");
    }
    let trained = match &args.labels {
        Some(labels) => trained(&args.tokens, labels)?,
        None => vec![false; args.tokens.len()],
    };
    let mut pass = Pass::default();
    pass.push(0, &args.tokens, &trained);
    compute::apply(&mut model, &params, args.compute.into(), &pass, args.labels.is_some())?;
    let mut workspace = Workspace::new(&model, Keep::Activations);
    let all: Vec<u32> = (0..pass.tokens() as u32).collect();
    let logits = model.logits(&params, &pass, &all, &mut workspace);
    let mut tensors = Tensors::from([("logits".to_owned(), (vec![pass.tokens(), vocab], logits))]);
    if args.labels.is_some() {
        let mut grads = vec![0.0; params.len()];
        let loss = model.loss_and_gradient(&params, &mut grads, &pass, None, &mut workspace);
        let count = pass.labels.len() as f64;
        grads.iter_mut().for_each(|g| *g = (f64::from(*g) / count) as f32);
        tensors.extend(model.tensors_of(&grads));
        tensors.insert("loss".to_owned(), (vec![1], vec![(loss / count) as f32]));
        outln!("loss {:.6} over {} label tokens", loss / count, pass.labels.len());
    }
    write(&args.out, &tensors)?;
    outln!("wrote {} tensors to {}", tensors.len(), args.out.display());
    Ok(())
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
pub fn write(path: &std::path::Path, tensors: &Tensors) -> Result<()> {
    let tensors: Vec<Tensor<'_>> =
        tensors.iter().map(|(name, (shape, values))| Tensor { name, shape, values: Values::F32(values) }).collect();
    Ok(stage(path, &[("format", "pt")], &tensors)?.commit()?)
}
