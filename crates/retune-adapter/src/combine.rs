//! Several LoRA adapters made one, with a weight for each.
//!
//! The kinds are those of PEFT's `add_weighted_adapter` (0.21.2), value for value, and one of our own, [`Kind::Exact`]. Where PEFT differs
//! from what its names say, so does this: `linear` weighs A and B apart, so that its product is not the weighted sum of the changes. One
//! thing is not followed: PEFT copies `use_rslora` from the first adapter and with it scales what it has made by sqrt(r); here the scale is 1.
//!
//! What is combined are low-rank changes. Whole modules and biases are refused, of which PEFT silently drops or resets the trained values.

use std::collections::BTreeSet;

use rayon::prelude::*;
use retune_kernels::random;

use crate::config::{Bias, LoraConfig, MAX_RANK, ModuleSelection};
use crate::delta::{Deltas, LoraDelta, plain_lora};
use crate::error::Error;
use crate::files::Tensors;
use crate::names::{self, Key, Part};
use crate::svd::Svd;

/// How the changes of several adapters become one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum), value(rename_all = "snake_case"))]
pub enum Kind {
    /// The weighted sum of the changes, at the least rank that holds it
    #[default]
    Exact,
    /// PEFT's sums of the A's and of the B's, apart; its product is not the weighted sum of the changes
    Linear,
    /// The weighted sum of the changes, at the sum of the ranks
    Cat,
    /// The nearest to the weighted sum of the changes at --svd-rank
    Svd,
    /// TIES (Yadav et al. 2023) on the A's and on the B's: the largest values, where their signs agree
    Ties,
    /// TIES on the changes, then cut to --svd-rank
    TiesSvd,
    /// DARE (Yu et al. 2023) on the A's and on the B's: values dropped at random, the rest scaled up
    DareLinear,
    /// DARE on the changes, then cut to --svd-rank
    DareLinearSvd,
    /// DARE, then TIES' vote on signs, on the A's and on the B's
    DareTies,
    /// DARE, then TIES' vote on signs, on the changes, then cut to --svd-rank
    DareTiesSvd,
    /// The largest values of the A's and of the B's
    MagnitudePrune,
    /// The largest values of the changes, then cut to --svd-rank
    MagnitudePruneSvd,
}

/// What TIES takes for the sign that most adapters agree on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum), value(rename_all = "snake_case"))]
pub enum MajoritySign {
    /// The sign of the sum of the values
    #[default]
    Total,
    /// The sign of most of the values
    Frequency,
}

/// A kind with its settings; those that it does not use must be absent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    pub kind: Kind,
    /// Share of the values that are kept, in (0, 1]; needed wherever values are dropped.
    pub density: Option<f64>,
    /// TIES' vote; [`MajoritySign::Total`] when absent.
    pub majority_sign: Option<MajoritySign>,
    /// Rank of the result of the kinds that end in `svd`; the largest rank of the adapters when absent.
    pub svd_rank: Option<usize>,
    /// Seed of DARE's choice; 0 when absent.
    pub seed: Option<u64>,
}

/// Which values are kept.
#[derive(Clone, Copy, PartialEq)]
enum Prune {
    None,
    Largest,
    Random,
}

/// On what a rule works.
#[derive(Clone, Copy, PartialEq)]
enum On {
    /// On nothing: the terms of all changes are put side by side.
    Terms,
    /// On A and on B, apart.
    Factors,
    /// On the change, `[out, in]`.
    Change,
}

/// A kind in its parts.
struct Rule {
    on: On,
    prune: Prune,
    vote: bool,
}

impl Kind {
    fn rule(self) -> Rule {
        let (on, prune, vote) = match self {
            Self::Exact | Self::Cat => (On::Terms, Prune::None, false),
            Self::Linear => (On::Factors, Prune::None, false),
            Self::Svd => (On::Change, Prune::None, false),
            Self::Ties => (On::Factors, Prune::Largest, true),
            Self::TiesSvd => (On::Change, Prune::Largest, true),
            Self::DareLinear => (On::Factors, Prune::Random, false),
            Self::DareLinearSvd => (On::Change, Prune::Random, false),
            Self::DareTies => (On::Factors, Prune::Random, true),
            Self::DareTiesSvd => (On::Change, Prune::Random, true),
            Self::MagnitudePrune => (On::Factors, Prune::Largest, false),
            Self::MagnitudePruneSvd => (On::Change, Prune::Largest, false),
        };
        Rule { on, prune, vote }
    }
}

impl Settings {
    /// Checks that every setting there is has an effect, and that those that are needed are there.
    ///
    /// # Errors
    /// [`Error::Combination`] names the setting.
    pub fn check(&self) -> Result<(), Error> {
        let rule = self.kind.rule();
        let bad = |setting, problem: String| Err(Error::Combination { setting, problem });
        let unused = |setting, by: &str| bad(setting, format!("has no effect on this kind; only {by} use it"));
        match self.density {
            Some(_) if rule.prune == Prune::None => return unused("density", "ties, dare and magnitude_prune"),
            None if rule.prune != Prune::None => {
                return bad("density", "is missing; give the share of the values to keep, such as 0.5".to_owned());
            }
            Some(density) if !(density > 0.0 && density <= 1.0) => {
                return bad("density", format!("is {density}; expected a share above 0 and up to 1"));
            }
            _ => {}
        }
        match self.svd_rank {
            Some(_) if rule.on != On::Change => return unused("svd_rank", "kinds that end in svd"),
            Some(rank) if rank == 0 || rank > MAX_RANK => {
                return bad("svd_rank", format!("is {rank}; expected 1 to {MAX_RANK}"));
            }
            _ => {}
        }
        if self.majority_sign.is_some() && !rule.vote {
            return unused("majority_sign", "the kinds with ties");
        }
        if self.seed.is_some() && rule.prune != Prune::Random {
            return unused("seed", "the kinds with dare");
        }
        Ok(())
    }
}

/// An adapter to combine.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// What an error calls it.
    pub name: &'a str,
    pub deltas: &'a Deltas,
    /// Any finite number; a negative one takes the adapter away.
    pub weight: f64,
}

/// What came of combining.
#[derive(Debug, Clone, PartialEq)]
pub struct Combination {
    /// The rank of every module: where less would do, rows of A and columns of B are zero, because programs that serve adapters take one
    /// rank for all modules.
    pub r: usize,
    /// The changes, all of scale 1.
    pub deltas: Deltas,
    /// ‖combined − exact‖ / ‖exact‖ over all modules together, where exact is the weighted sum of the changes; 0 within f32's rounding of
    /// the changes, infinite where the sum is zero within it and the result is not.
    pub difference: f64,
}

/// Which of an adapter's tensors a mask is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaskOf {
    A,
    B,
    /// B·A, `[out, in]`.
    Change,
}

/// Which values DARE keeps: of a module, of the adapter with this number among the sources, of one of its tensors with so many values.
pub type Masks<'a> = dyn Fn(&str, usize, MaskOf, usize) -> Vec<bool> + Sync + 'a;

/// Combines adapters. Modules that an adapter does not change count as zero in it, as in PEFT; the order of modules and the number of
/// threads do not matter.
///
/// # Errors
/// Settings that contradict each other or have no effect; no source; a weight that is not finite; modules of different shapes; ranks that
/// differ, for kinds that add up A and B; a decomposition that fails.
pub fn combine(sources: &[Source<'_>], settings: &Settings) -> Result<Combination, Error> {
    let (seed, density) = (settings.seed.unwrap_or(0), settings.density.unwrap_or(1.0));
    combine_with(sources, settings, &|module, source, of, len| {
        let key = random::derive(random::derive(random::derive(0, seed), random::hash(module)), source as u64);
        let key = random::derive(key, of as u64);
        (0..len as u64).map(|i| unit(random::at(key, i)) < density).collect()
    })
}

/// Uniform in [0, 1), in steps of 2⁻⁵³.
fn unit(word: u64) -> f64 {
    (word >> 11) as f64 / (1u64 << 53) as f64
}

/// As [`combine`], with the masks of those kinds that drop values at random given.
///
/// # Errors
/// As [`combine`].
///
/// # Panics
/// When a mask has another length than it was asked for.
pub fn combine_with(sources: &[Source<'_>], settings: &Settings, masks: &Masks<'_>) -> Result<Combination, Error> {
    settings.check()?;
    check_sources(sources)?;
    let modules: BTreeSet<&str> = sources.iter().flat_map(|source| source.deltas.keys()).map(String::as_str).collect();
    let modules = modules.into_iter().map(|name| Module::of(name, sources)).collect::<Result<Vec<_>, _>>()?;
    let rule = settings.kind.rule();
    if rule.on == On::Factors {
        modules.iter().try_for_each(|module| module.check_ranks(sources))?;
    }
    let ranks = sources.iter().map(|source| source.deltas.values().map(|delta| delta.r).max().unwrap_or(0));
    let r = match settings.kind {
        Kind::Exact => modules.par_iter().map(Module::numeric_rank).try_reduce(|| 1, |a, b| Ok(a.max(b)))?,
        Kind::Cat => ranks.sum(),
        _ => settings.svd_rank.unwrap_or(ranks.max().unwrap_or(0)),
    };
    let most = modules.iter().map(Module::most_rank).max().unwrap_or(0);
    if settings.svd_rank.is_some_and(|rank| rank > most) {
        let problem = format!("is {r}, and no change of these adapters has a rank above {most}; lower it");
        return Err(Error::Combination { setting: "svd_rank", problem });
    }
    if r > MAX_RANK {
        let problem = format!("have a rank of {r} together; combine fewer, or cut them to a lower rank (svd)");
        return Err(Error::Combination { setting: "the adapters", problem });
    }
    let combined: Vec<(LoraDelta, [f64; 3])> = modules
        .par_iter()
        .map(|module| {
            let (delta, exact) = (module.combined(&rule, settings, r, masks)?, module.side_by_side());
            let norms = [delta.distance(&exact), exact.norm(), module.size()];
            Ok((delta, norms))
        })
        .collect::<Result<_, Error>>()?;
    let total = |of: usize| combined.iter().map(|(_, norms)| norms[of].powi(2)).sum::<f64>().sqrt();
    let (away, exact, rounding) = (total(0), total(1), f64::from(f32::EPSILON) * total(2));
    let difference = match away {
        away if away <= rounding => 0.0,
        _ if exact <= rounding => f64::INFINITY,
        away => away / exact,
    };
    let names = modules.iter().map(|module| module.name.to_owned());
    Ok(Combination { r, deltas: names.zip(combined.into_iter().map(|(delta, _)| delta)).collect(), difference })
}

fn check_sources(sources: &[Source<'_>]) -> Result<(), Error> {
    let bad = |setting, problem: String| Err(Error::Combination { setting, problem });
    if sources.is_empty() {
        return bad("the adapters", "are missing; give one or more".to_owned());
    }
    for source in sources {
        if !(source.weight as f32).is_finite() {
            return bad("the weight", format!("of {} is {}; expected a finite number", source.name, source.weight));
        }
        if source.deltas.is_empty() {
            return bad("the adapters", format!("must adapt something, and {} adapts no module", source.name));
        }
    }
    Ok(())
}

/// What the adapters do to one module.
struct Module<'a> {
    name: &'a str,
    in_features: usize,
    out_features: usize,
    terms: Vec<Term<'a>>,
}

/// What one adapter does to a module.
struct Term<'a> {
    /// Number among the sources.
    source: usize,
    delta: &'a LoraDelta,
    weight: f64,
}

impl Term<'_> {
    /// What B·A is multiplied by.
    fn factor(&self) -> f64 {
        self.weight * f64::from(self.delta.scale)
    }
}

impl<'a> Module<'a> {
    /// The largest rank that a change of it can have.
    fn most_rank(&self) -> usize {
        self.in_features.min(self.out_features)
    }

    fn of(name: &'a str, sources: &[Source<'a>]) -> Result<Self, Error> {
        let mut module = Self { name, in_features: 0, out_features: 0, terms: Vec::new() };
        for (index, source) in sources.iter().enumerate() {
            let Some(delta) = source.deltas.get(name) else { continue };
            let shape = [delta.out_features, delta.in_features];
            if let Some(Term { source: first, .. }) = module.terms.first()
                && shape != [module.out_features, module.in_features]
            {
                let expected = [module.out_features, module.in_features];
                let problem = format!(
                    "are for different models: {name} is {expected:?} in {} and {shape:?} in {}",
                    sources[*first].name, source.name
                );
                return Err(Error::Combination { setting: "the adapters", problem });
            }
            [module.out_features, module.in_features] = shape;
            module.terms.push(Term { source: index, delta, weight: source.weight });
        }
        Ok(module)
    }

    fn check_ranks(&self, sources: &[Source<'_>]) -> Result<(), Error> {
        let mut terms = self.terms.iter();
        let Some(first) = terms.next() else { return Ok(()) };
        match terms.find(|term| term.delta.r != first.delta.r) {
            None => Ok(()),
            Some(other) => Err(Error::CombinedRanks {
                module: self.name.to_owned(),
                first: sources[first.source].name.to_owned(),
                rank: first.delta.r,
                second: sources[other.source].name.to_owned(),
                other: other.delta.r,
            }),
        }
    }

    fn delta(&self, r: usize, a: Vec<f32>, b: Vec<f32>) -> LoraDelta {
        LoraDelta { r, in_features: self.in_features, out_features: self.out_features, scale: 1.0, a, b }
    }

    /// The weighted sum of the changes, as all their terms: A's one below the other, scaled, and B's side by side.
    fn side_by_side(&self) -> LoraDelta {
        let r = self.terms.iter().map(|term| term.delta.r).sum();
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for term in &self.terms {
            let factor = term.factor();
            a.extend(term.delta.a.iter().map(|&a| (factor * f64::from(a)) as f32));
        }
        for row in 0..self.out_features {
            for Term { delta, .. } in &self.terms {
                b.extend_from_slice(&delta.b[row * delta.r..(row + 1) * delta.r]);
            }
        }
        self.delta(r, a, b)
    }

    /// The decomposition of the weighted sum, and how many singular values it has beyond what f32 does not hold beside the largest, and
    /// beyond the rounding of changes that cancel each other.
    fn decomposed(&self, sum: &LoraDelta) -> Result<(Svd, usize), Error> {
        let svd = Svd::of_product(self.out_features, self.in_features, sum.r, &sum.b, &sum.a)?;
        let values = svd.singular_values();
        let noise = f64::EPSILON * sum.r as f64 * self.size();
        let least = values.first().map_or(0.0, |largest| largest * f64::from(f32::EPSILON)).max(noise);
        let rank = values.iter().take_while(|value| **value > least).count();
        Ok((svd, rank))
    }

    fn numeric_rank(&self) -> Result<usize, Error> {
        Ok(self.decomposed(&self.side_by_side())?.1)
    }

    /// The norms of the weighted changes, added up.
    fn size(&self) -> f64 {
        self.terms.iter().map(|term| term.weight.abs() * term.delta.norm()).sum()
    }

    /// The combined change at rank `r`.
    fn combined(&self, rule: &Rule, settings: &Settings, r: usize, masks: &Masks<'_>) -> Result<LoraDelta, Error> {
        let cut = |(svd, rank): (Svd, usize)| {
            let (b, a) = svd.factors(rank.min(r));
            self.delta(rank.min(r), a, b).padded(r)
        };
        match rule.on {
            On::Terms => {
                let sum = self.side_by_side();
                if sum.r > r { Ok(cut(self.decomposed(&sum)?)) } else { Ok(sum.padded(r)) }
            }
            On::Change if rule.prune == Prune::None => Ok(cut(self.decomposed(&self.side_by_side())?)),
            On::Change => {
                let changes = self.terms.iter().map(|term| term.delta.dense()).collect();
                let weights: Vec<f64> = self.terms.iter().map(|term| term.weight).collect();
                let dense = self.apply(rule, settings, MaskOf::Change, changes, &weights, masks);
                Ok(cut((Svd::of_matrix(self.out_features, self.in_features, &dense)?, r)))
            }
            On::Factors => {
                // PEFT puts the root of a weight on either factor, and its sign on A.
                let factors = self.terms.iter().map(Term::factor);
                let roots: Vec<f64> = factors.clone().map(|factor| factor.abs().sqrt()).collect();
                let signed: Vec<f64> = factors.zip(&roots).map(|(factor, root)| root.copysign(factor)).collect();
                let all_a = self.terms.iter().map(|term| term.delta.a.clone()).collect();
                let all_b = self.terms.iter().map(|term| term.delta.b.clone()).collect();
                let a = self.apply(rule, settings, MaskOf::A, all_a, &signed, masks);
                let b = self.apply(rule, settings, MaskOf::B, all_b, &roots, masks);
                let rank = self.terms.first().map_or(0, |term| term.delta.r);
                Ok(self.delta(rank, a, b).padded(r))
            }
        }
    }

    /// Drops values of one tensor of each adapter, and adds up the rest with weights.
    fn apply(
        &self,
        rule: &Rule,
        settings: &Settings,
        of: MaskOf,
        mut tensors: Vec<Vec<f32>>,
        weights: &[f64],
        masks: &Masks<'_>,
    ) -> Vec<f32> {
        let density = settings.density.unwrap_or(1.0);
        if density < 1.0 {
            for (Term { source, .. }, tensor) in self.terms.iter().zip(&mut tensors) {
                match rule.prune {
                    Prune::None => {}
                    Prune::Largest => keep_largest(tensor, density),
                    Prune::Random => {
                        let mask = masks(self.name, *source, of, tensor.len());
                        assert_eq!(mask.len(), tensor.len(), "a mask for {}", self.name);
                        for (value, keep) in tensor.iter_mut().zip(mask) {
                            *value = if keep { (f64::from(*value) / density) as f32 } else { 0.0 };
                        }
                    }
                }
            }
        }
        let votes = rule.vote.then(|| settings.majority_sign.unwrap_or_default());
        let len = tensors.first().map_or(0, Vec::len);
        (0..len).map(|i| weighted(tensors.iter().map(|tensor| tensor[i]), weights, votes)).collect()
    }
}

/// Sets all values but the largest to zero: `density` of them, rounded down, stay. Of equal ones the first stay.
fn keep_largest(values: &mut [f32], density: f64) {
    let kept = (density * values.len() as f64) as usize;
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[j].abs().total_cmp(&values[i].abs()));
    for &i in &order[kept..] {
        values[i] = 0.0;
    }
}

/// Σ weight · value; with a vote only over the values whose sign the majority has, divided by their number.
fn weighted(values: impl Iterator<Item = f32> + Clone, weights: &[f64], vote: Option<MajoritySign>) -> f32 {
    let terms = values.clone().map(f64::from).zip(weights);
    let Some(vote) = vote else { return terms.map(|(value, weight)| value * weight).sum::<f64>() as f32 };
    let sign = |value: f64| if value == 0.0 { 0.0 } else { value.signum() };
    // The vote is of the values without their weights; a draw is positive.
    let sum: f64 = match vote {
        MajoritySign::Total => values.map(f64::from).sum(),
        MajoritySign::Frequency => values.map(|value| sign(f64::from(value))).sum(),
    };
    let majority = if sum >= 0.0 { 1.0 } else { -1.0 };
    let agreeing = terms.filter(|(value, _)| sign(*value) == majority);
    let (sum, count) =
        agreeing.fold((0.0, 0.0f64), |(sum, count), (value, weight)| (sum + value * weight, count + 1.0));
    (sum / count.max(1.0)) as f32
}

/// Refuses what an adapter holds beside low-rank changes, of which there is no weighted sum in this form.
///
/// # Errors
/// [`Error::NotCombinable`] says what it is.
pub fn refuse_beside(name: &str, config: &LoraConfig, tensors: &Tensors) -> Result<(), Error> {
    let refused = |what: &str| Err(Error::NotCombinable { adapter: name.to_owned(), what: what.to_owned() });
    if !config.modules_to_save.is_empty() {
        return refused(&format!("modules that were trained whole ({})", config.modules_to_save.join(", ")));
    }
    if config.bias != Bias::None {
        return refused(&format!("trained biases (bias: {})", config.bias.as_str()));
    }
    for key in tensors.keys() {
        match names::parse(key) {
            Key::Part(_, Part::LoraA | Part::LoraB | Part::BaseWeight) | Key::Copy => {}
            Key::Part(..) | Key::Unknown => return refused(&format!("the tensor {key}")),
        }
    }
    Ok(())
}

impl Combination {
    /// The configuration and the tensors of the combined adapter, from the configurations of what was combined.
    pub fn adapter(&self, configs: &[&LoraConfig]) -> (LoraConfig, Tensors) {
        plain_lora(self.r, &self.deltas, target_modules(configs, &self.deltas))
    }
}

/// The names of the configurations together where they are plain lists; else every module by its full name.
fn target_modules(configs: &[&LoraConfig], deltas: &Deltas) -> Vec<String> {
    let mut names = BTreeSet::new();
    for config in configs {
        match &config.target_modules {
            ModuleSelection::List(list) if config.exclude_modules.is_none() && config.layers_to_transform.is_none() => {
                names.extend(list.iter().cloned());
            }
            _ => return deltas.keys().cloned().collect(),
        }
    }
    names.into_iter().collect()
}
