//! LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), LoRA+ (Hayou et al. 2024) and DoRA (Liu et al. 2024) with what PEFT lets them train beside: biases and whole modules.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use retune_engine::overlay::{Factor, LowRank, Offset, OutputScale, Overlay, TableTerm, TokenRows};
use retune_engine::row_norms::{column_norms, row_norms};
use retune_engine::spec::ModelSpec;
use retune_kernels::{PanelSource, dropout, random};
use serde_json::Value;

use crate::check::check_against;
use crate::config::{InitLoraWeights, LoraConfig, TokenIndices, config_error};
use crate::error::Error;
use crate::files::{AdapterFile, Tensors, tensors_of};
use crate::init::{self, init_lora};
use crate::method::{self, Method, MethodInfo, Start};
use crate::names::{self, Key, Part, trained_biases};
use crate::peft_config;
use crate::selection::is_name_or_end;
use crate::targets::{self, BaseModules, LoraTarget};
use crate::walk::{Saved, check_table, walk};

/// The setting that names rows of tokens.
const TOKENS: &str = "trainable_token_indices";

pub static INFO: MethodInfo = MethodInfo {
    name: "lora",
    peft_type: Some("LORA"),
    what: "low-rank adapters on chosen linear modules (LoRA, rsLoRA, LoRA+, DoRA, PiSSA, OLoRA)",
    learning_rate: 2e-4,
    read: method::read::<LoraConfig>,
    schema: Some(|generator| generator.subschema_for::<LoraConfig>()),
    from_peft: peft_config::lora,
};

impl Method for LoraConfig {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn settings(&self) -> Result<Value, serde_json::Error> {
        serde_json::to_value(self)
    }

    fn check(&self) -> Result<(), Error> {
        LoraConfig::check(self)
    }

    fn lower(&self, spec: &ModelSpec, strict: bool) -> Result<Overlay, Error> {
        let modules = BaseModules::of(spec);
        let targets = if strict { targets::resolve(self, &modules) } else { targets::select(self, &modules) }?;
        if strict {
            self.check_trainable(spec)?;
        }
        let overlay = on_targets(self, spec, &targets)?;
        if strict {
            self.check_effects(&targets, &overlay)?;
        }
        Ok(overlay)
    }

    fn initialise(
        &self,
        spec: &ModelSpec,
        overlay: &Overlay,
        start: &Start<'_>,
        params: &mut [f32],
    ) -> Result<(), Error> {
        self.start_tables(spec, overlay, start, params)?;
        if self.init_lora_weights.is_of_the_weight() {
            return init::of_the_weights(&self.init_lora_weights, spec, overlay, start, params);
        }
        for (linear, change) in spec.linears().zip(&overlay.linears) {
            let [LowRank { a: Factor::Trained(a), b: Factor::Trained(b), r, .. }] = &change.low_rank[..] else {
                continue;
            };
            // B follows A.
            let (a, b) = params[a.start..b.end].split_at_mut(a.len());
            init_lora(&linear.name, *r, &self.init_lora_weights, start.seed, a, b);
            if let Some(OutputScale::OverNorm(magnitudes)) = &change.output_scale {
                let weight = start.weight(spec, linear)?;
                // The norms as the engine computes them, so that a B of zeros changes nothing.
                let norms = row_norms(&weight, change, params);
                params[magnitudes.clone()].copy_from_slice(&norms);
            }
        }
        Ok(())
    }

    /// The start of what is taken away from the weight stands on it as a second term of the opposite sign.
    fn keep_start(&self, overlay: &mut Overlay, first: &[f32]) {
        if !self.keeps_start() {
            return;
        }
        for change in &mut overlay.linears {
            let [LowRank { a: Factor::Trained(a), b: Factor::Trained(b), r, scale, key, .. }] = &change.low_rank[..]
            else {
                continue;
            };
            let frozen = |range: &Range<usize>| Factor::Frozen(first[range.clone()].into());
            let term = LowRank { a: frozen(a), b: frozen(b), r: *r, scale: -scale, dropout: 0.0, key: *key };
            change.low_rank.push(term);
        }
    }

    fn keeps_start(&self) -> bool {
        self.init_lora_weights.is_of_the_weight()
    }

    /// Both terms as one of twice the rank, which is plain LoRA on the base as it was.
    fn exported(&self, overlay: &Overlay, params: &[f32]) -> Option<(Arc<dyn Method>, Tensors)> {
        if !self.keeps_start() {
            return None;
        }
        let mut tensors = tensors_of(overlay, params);
        for change in &overlay.linears {
            let [LowRank { a: Factor::Trained(a), b: Factor::Trained(b), .. }, start] = &change.low_rank[..] else {
                continue;
            };
            for (range, frozen, is_a) in [(a, &start.a, true), (b, &start.b, false)] {
                let param = overlay.layout.params().iter().find(|param| param.range == *range)?;
                let (shape, values) = tensors.get_mut(&param.name)?;
                let frozen = frozen.values(params);
                if is_a {
                    values.extend_from_slice(&frozen);
                    shape[0] *= 2;
                } else {
                    let rows = values.chunks_exact(shape[1]).zip(frozen.chunks_exact(shape[1]));
                    *values =
                        rows.flat_map(|(row, start)| row.iter().copied().chain(start.iter().map(|v| -v))).collect();
                    shape[1] *= 2;
                }
            }
        }
        Some((Arc::new(self.at_twice_the_rank()), tensors))
    }

    fn start_settings(&self) -> Vec<&'static str> {
        let is_default = self.init_lora_weights == InitLoraWeights::default();
        if is_default { Vec::new() } else { vec!["init_lora_weights"] }
    }

    /// The head works on label tokens alone, where the masks of a row's tokens have no meaning.
    fn check_trainable(&self, spec: &ModelSpec) -> Result<(), Error> {
        let targets = targets::select(self, &BaseModules::of(spec))?;
        let head = &spec.head.linear.name;
        if self.lora_dropout > 0.0 && targets.iter().any(|target| target.module == *head) {
            return Err(Error::HeadDropout { field: "lora_dropout" });
        }
        Ok(())
    }

    fn spell(&self, keys: &[&str]) -> Vec<Option<String>> {
        let adapted: BTreeSet<String> = keys
            .iter()
            .filter_map(|key| match names::parse(key) {
                Key::Part(module, Part::LoraA | Part::LoraB) => Some(module),
                _ => None,
            })
            .collect();
        let spelled = |key: &&str| match names::parse(key) {
            Key::Part(module, Part::Bias) => Some(names::trained_bias(&module, adapted.contains(&module))),
            Key::Part(module, part) => Some(part.key(&module)),
            Key::Copy => None,
            Key::Unknown => Some((*key).to_owned()),
        };
        keys.iter().map(spelled).collect()
    }

    fn check_file(&self, file: &AdapterFile, modules: &BaseModules<'_>) -> Result<(), Error> {
        check_against(self, file, modules).map(|_| ())
    }

    fn changes_nothing(&self, tensors: &Tensors) -> bool {
        let is_zero = |values: &[f32]| values.iter().all(|value| *value == 0.0);
        // A term is nothing where the factor that starts as zero is zero.
        let is_nothing = |(key, (_, values)): (&String, &(Vec<usize>, Vec<f32>))| match names::parse(key) {
            Key::Part(_, Part::LoraB | Part::LoraBBias | Part::EmbeddingA) => is_zero(values),
            Key::Part(_, Part::LoraA | Part::EmbeddingB | Part::BaseWeight) | Key::Copy => true,
            Key::Part(..) | Key::Unknown => false,
        };
        let is_factor = |key: &String| matches!(names::parse(key), Key::Part(_, Part::LoraB | Part::EmbeddingA));
        tensors.keys().any(is_factor) && tensors.iter().all(is_nothing)
    }

    fn peft_config(&self, modules: &BaseModules<'_>) -> Result<BTreeMap<&'static str, Value>, Error> {
        let targets = targets::select(self, modules)?;
        Ok(peft_config::lora_keys(self, &targets, modules)?)
    }

    fn lora(&self) -> Option<&LoraConfig> {
        Some(self)
    }

    fn compatibility_notes(&self) -> Vec<String> {
        peft_config::compatibility_notes(self)
    }
}

/// Lays out low-rank terms on tables, and rows of tokens.
fn on_tables(
    config: &LoraConfig,
    spec: &ModelSpec,
    targets: &[LoraTarget],
    overlay: &mut Overlay,
) -> Result<(), Error> {
    for target in targets.iter().filter(|target| target.is_table) {
        check_table("target_modules", spec)?;
        if config.lora_bias || config.init_lora_weights.is_of_the_weight() {
            let problem = format!(
                "names {}, a table of rows, on which lora_bias and a start from the weight are not available; take it out, or use plain LoRA",
                target.module
            );
            return config_error("target_modules", problem);
        }
        let (r, scale) = (target.r, target.scaling);
        let layout = &mut overlay.layout;
        let a = layout.add_transposed(names::embedding_a(&target.module), vec![r, target.in_features], None);
        let b = layout.add(names::embedding_b(&target.module), vec![target.out_features, r], None);
        let magnitudes = || layout.add(names::lora_magnitude(&target.module), vec![target.out_features], None);
        let magnitudes = config.use_dora.then(magnitudes);
        let term = Some(TableTerm { a, b, r, scale, magnitudes });
        if target.module == spec.table.name {
            overlay.table_term = term;
        } else {
            overlay.positions_term = term;
        }
    }
    let modules = BaseModules::of(spec);
    for (module, ids) in config.token_rows(&modules)? {
        // PEFT takes every model with an encoder for one whose head is the table.
        if spec.encoder.is_some() && !spec.head.tied && module == spec.table.name {
            let head = &spec.head.linear.name;
            let problem = format!(
                "names rows of {module}, which PEFT puts into {head} as well, though that is a head of its own; name rows of {head} alone, or leave it out"
            );
            return config_error(TOKENS, problem);
        }
        let is_same =
            |name: &str| name == module || spec.head.tied && module == spec.table.name && name == spec.head.linear.name;
        if let Some(target) = targets.iter().find(|target| is_same(&target.module)) {
            let problem = format!(
                "names rows of {}, which target_modules adapts as well; take it out of one of them",
                target.module
            );
            return config_error(TOKENS, problem);
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= spec.vocab_size) {
            let problem = format!("there is no token {id} in a vocabulary of {}; give ids below that", spec.vocab_size);
            return config_error(TOKENS, problem);
        }
        if config.selection().saved_by(module).is_some() {
            let problem =
                format!("names rows of {module}, which modules_to_save trains whole; take it out of one of them");
            return config_error(TOKENS, problem);
        }
        let rows = overlay.layout.add(names::token_rows(module), vec![ids.len(), spec.hidden_size], None);
        let rows = Some(TokenRows { ids: ids.into(), rows });
        if module == spec.table.name {
            if spec.head.tied {
                overlay.head_rows.clone_from(&rows);
            }
            overlay.table_rows = rows;
        } else {
            overlay.head_rows = rows;
        }
    }
    Ok(())
}

impl LoraConfig {
    /// Rows of tokens start as the base's; of tables A is zero and B normal, or both are normal, and DoRA's lengths are the columns'.
    fn start_tables(
        &self,
        spec: &ModelSpec,
        overlay: &Overlay,
        start: &Start<'_>,
        params: &mut [f32],
    ) -> Result<(), Error> {
        let head = if spec.head.tied { None } else { overlay.head_rows.as_ref() };
        let head = head.map(|rows| (rows, &spec.head.linear.name));
        for (TokenRows { ids, rows }, module) in
            overlay.table_rows.iter().map(|rows| (rows, &spec.table.name)).chain(head)
        {
            let table = (start.tensor)(&format!("{module}.weight"))?;
            for (&id, row) in ids.iter().zip(params[rows.clone()].chunks_exact_mut(spec.hidden_size)) {
                table.panel_f32(id as usize..id as usize + 1, 0..spec.hidden_size, row);
            }
        }
        let is_random = self.init_lora_weights == InitLoraWeights::LinearDefault;
        for term in [&overlay.table_term, &overlay.positions_term].into_iter().flatten() {
            for (place, is_a) in [(&term.a, true), (&term.b, false)] {
                let Some(param) = overlay.layout.at(place.start).filter(|_| is_random || !is_a) else { continue };
                let key = random::derive(random::derive(0, start.seed), random::hash(&param.name));
                let values = params[place.clone()].iter_mut().enumerate();
                values.for_each(|(i, value)| *value = random::normal(key, i as u64) as f32);
            }
        }
        let tables =
            [(Some(&spec.table.name), &overlay.table_term), (spec.table.positions.as_ref(), &overlay.positions_term)];
        for (name, term) in tables {
            let (Some(name), Some(term)) = (name, term) else { continue };
            let Some(magnitudes) = &term.magnitudes else { continue };
            let norms = column_norms(&(start.tensor)(&format!("{name}.weight"))?, term, params);
            params[magnitudes.clone()].copy_from_slice(&norms);
        }
        Ok(())
    }

    /// The modules of which rows are trained, by their full names, and the tokens whose rows they are.
    ///
    /// # Errors
    /// A name that is neither the token embedding nor a head of its own.
    pub(crate) fn token_rows<'m>(&self, modules: &BaseModules<'m>) -> Result<Vec<(&'m str, &[u32])>, Error> {
        let table = modules.tables.first().map(|table| table.name);
        let head = modules.linears.last().filter(|module| module.is_output_head).map(|module| module.name);
        match &self.trainable_token_indices {
            None => Ok(Vec::new()),
            Some(TokenIndices::List(ids)) => Ok(table.map(|table| (table, ids.as_slice())).into_iter().collect()),
            Some(TokenIndices::Map(map)) => {
                let mut rows: Vec<(&'m str, &[u32])> = Vec::new();
                for (entry, ids) in map {
                    let found = [table, head.filter(|_| !modules.is_tied)].into_iter().flatten();
                    let found = found.into_iter().find(|name| is_name_or_end(name, entry));
                    let Some(name) = found else {
                        let tied = if modules.is_tied { ", which the head shares" } else { " and the head" };
                        let table = table.unwrap_or("the token embedding");
                        let problem = format!("`{entry}` has no rows of tokens of its own; expected {table}{tied}");
                        return config_error(TOKENS, problem);
                    };
                    if rows.iter().any(|(known, _)| *known == name) {
                        return config_error(TOKENS, format!("two entries mean {name}; give its tokens in one"));
                    }
                    rows.push((name, ids.as_slice()));
                }
                Ok(rows)
            }
        }
    }

    /// Refuses settings that would have no effect on these targets, and a start that a weight has not enough of.
    fn check_effects(&self, targets: &[LoraTarget], overlay: &Overlay) -> Result<(), Error> {
        if self.lora_dropout > 0.0 && targets.iter().all(|target| target.is_table) {
            let problem = "has no effect on tables, and nothing else is adapted; set it to 0".to_owned();
            return config_error("lora_dropout", problem);
        }
        if self.loraplus_lr_ratio.is_some_and(|ratio| ratio != 1.0)
            && overlay.layout.params().iter().all(|param| param.rate == 1.0)
        {
            let problem = "has no effect: neither a B of a linear module nor a vector is trained; remove it".to_owned();
            return config_error("loraplus_lr_ratio", problem);
        }
        let most = |target: &LoraTarget| target.in_features.min(target.out_features);
        if self.init_lora_weights.is_of_the_weight()
            && let Some(target) = targets.iter().find(|target| target.r > most(target))
        {
            let LoraTarget { module, r, .. } = target;
            let problem = format!(
                "a rank of {r} is more than the {} that the weight of {module} has, and the rest could not be trained from such a start; lower it, or \
                 name the module in rank_pattern",
                most(target)
            );
            return config_error("r", problem);
        }
        Ok(())
    }

    /// The settings that scale a term of twice the rank as these do one of this.
    fn at_twice_the_rank(&self) -> LoraConfig {
        let alpha = if self.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        LoraConfig {
            r: 2 * self.r,
            lora_alpha: alpha * self.lora_alpha,
            rank_pattern: self.rank_pattern.iter().map(|(of, r)| (of.to_owned(), 2 * r)).collect(),
            alpha_pattern: self.alpha_pattern.iter().map(|(of, value)| (of.to_owned(), alpha * value)).collect(),
            init_lora_weights: InitLoraWeights::default(),
            ..self.clone()
        }
    }
}

fn on_targets(config: &LoraConfig, spec: &ModelSpec, targets: &[LoraTarget]) -> Result<Overlay, Error> {
    let biases = trained_biases(config, &BaseModules::of(spec), targets);
    let saved = Saved::of(&config.selection(), spec)?;
    let bias = |module: &str, tensor: &str| {
        let trained = biases.iter().find(|bias| bias.module == module && tensor.ends_with(".bias"));
        trained.map(|bias| bias.key.clone())
    };
    let key = |module: &str, tensor: &str| saved.key(module, tensor).or_else(|| bias(module, tensor));
    let mut overlay = walk(spec, key, |overlay, id, linear| {
        let name = linear.name.as_str();
        let Some(target) = targets.iter().find(|target| target.module == name) else { return };
        let a = Factor::Trained(overlay.layout.add(names::lora_a(name), vec![target.r, linear.cols], None));
        let b = Factor::Trained(overlay.layout.add(names::lora_b(name), vec![linear.rows, target.r], None));
        let (r, scale, dropout) = (target.r, target.scaling, config.lora_dropout as f32);
        overlay.linears[id.0].low_rank.push(LowRank { a, b, r, scale, dropout, key: dropout::module_key(name) });
        if config.lora_bias {
            let place = overlay.layout.add(names::lora_b_bias(name), vec![linear.rows], None);
            overlay.linears[id.0].offset = Some(Offset { place, scale: target.scaling });
        }
        if config.use_dora {
            let magnitudes = overlay.layout.add(names::lora_magnitude(name), vec![linear.rows], None);
            overlay.linears[id.0].output_scale = Some(OutputScale::OverNorm(magnitudes));
        }
    });
    on_tables(config, spec, targets, &mut overlay)?;
    if let Some(ratio) = config.loraplus_lr_ratio {
        // As PEFT's optimizer groups them: B, and every vector, biases among them.
        overlay.layout.set_rate(ratio, |param| {
            matches!(names::parse(&param.name), Key::Part(_, Part::LoraB)) || param.shape.len() == 1
        });
    }
    Ok(overlay)
}
