//! Which modules of a model a method's settings select, by PEFT's rules.
//!
//! The rules are those of PEFT 0.21: an entry of a list is a module's name or its end after a dot; a string is a regular expression
//! for the whole name; what `modules_to_save` names is never adapted; a full name in a list is not bound by `layers_to_transform`.
//! Where PEFT stays silent about an entry without effect, [`Selection::resolve`] is strict; [`Selection::select`] is for adapters that PEFT has
//! written.

use std::collections::BTreeSet;

use crate::config::{ModuleSelection, OneOrMany, config_error};
use crate::error::Error;
use crate::pattern::Pattern;
use crate::targets::{LinearModule, count_ends};

/// The settings by which every method selects linear modules, under PEFT's names.
#[derive(Debug, Clone, Copy)]
pub struct Selection<'a> {
    pub target_modules: &'a ModuleSelection,
    pub exclude_modules: Option<&'a ModuleSelection>,
    pub layers_to_transform: Option<&'a OneOrMany<usize>>,
    pub layers_pattern: Option<&'a OneOrMany<String>>,
    pub modules_to_save: &'a [String],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Targeted,
    Excluded,
    Unmatched,
}

enum Names {
    AllLinear,
    List(Vec<String>),
    Pattern(Pattern),
}

struct Layers {
    numbers: Vec<usize>,
    patterns: Vec<Pattern>,
}

/// A selection with its patterns compiled.
struct Selector {
    include: Names,
    exclude: Option<Names>,
    saved: Vec<Pattern>,
    layers: Option<Layers>,
}

impl Selector {
    /// # Errors
    /// [`Error::Pattern`] when a pattern does not compile.
    fn new(selection: &Selection<'_>) -> Result<Self, Error> {
        let include = if selection.target_modules.is_all_linear() {
            Names::AllLinear
        } else {
            names("target_modules", selection.target_modules)?
        };
        let exclude = selection.exclude_modules.map(|excluded| names("exclude_modules", excluded)).transpose()?;
        let saved = selection
            .modules_to_save
            .iter()
            .map(|entry| Pattern::within("modules_to_save", entry))
            .collect::<Result<_, _>>()?;
        Ok(Self { include, exclude, saved, layers: layers(selection)? })
    }

    fn verdict(&self, module: &LinearModule<'_>) -> Result<Verdict, Error> {
        if let Some(exclude) = &self.exclude
            && exclude.matches(module)?
        {
            return Ok(Verdict::Excluded);
        }
        for saved in &self.saved {
            if saved.is_match(module.name)? {
                return Ok(Verdict::Excluded);
            }
        }
        let targeted = match &self.include {
            Names::List(entries) if entries.iter().all(|entry| entry != module.name) => {
                self.include.matches(module)? && self.in_layers(module.name)?
            }
            names => names.matches(module)?,
        };
        Ok(if targeted { Verdict::Targeted } else { Verdict::Unmatched })
    }

    fn in_layers(&self, name: &str) -> Result<bool, Error> {
        let Some(layers) = &self.layers else {
            return Ok(true);
        };
        Ok(layers.number_of(name)?.is_some_and(|number| layers.numbers.contains(&number)))
    }
}

impl Names {
    fn matches(&self, module: &LinearModule<'_>) -> Result<bool, Error> {
        match self {
            Self::AllLinear => Ok(!module.is_output_head && !module.is_table),
            Self::List(entries) => Ok(entries.iter().any(|entry| is_name_or_end(module.name, entry))),
            Self::Pattern(pattern) => pattern.is_match(module.name),
        }
    }
}

impl Layers {
    /// The layer a module is in: the first pattern that matches decides.
    fn number_of(&self, name: &str) -> Result<Option<usize>, Error> {
        for pattern in &self.patterns {
            if let Some(number) = pattern.number(name)? {
                return Ok(number);
            }
        }
        Ok(None)
    }
}

fn names(field: &'static str, selection: &ModuleSelection) -> Result<Names, Error> {
    Ok(match selection {
        ModuleSelection::List(entries) => Names::List(entries.clone()),
        ModuleSelection::Pattern(source) => Names::Pattern(Pattern::full(field, source)?),
    })
}

fn layers(selection: &Selection<'_>) -> Result<Option<Layers>, Error> {
    let patterns: Vec<Pattern> = match selection.layers_pattern {
        Some(given) => given
            .as_slice()
            .iter()
            .filter(|name| !name.is_empty())
            .map(|name| Pattern::layer_number("layers_pattern", Some(name.as_str())))
            .collect::<Result<_, _>>()?,
        None => Vec::new(),
    };
    let Some(numbers) =
        selection.layers_to_transform.map(|numbers| numbers.as_slice().to_vec()).filter(|numbers| !numbers.is_empty())
    else {
        return Ok(None);
    };
    let patterns = if patterns.is_empty() { vec![Pattern::layer_number("layers_pattern", None)?] } else { patterns };
    Ok(Some(Layers { numbers, patterns }))
}

pub(crate) fn is_name_or_end(name: &str, entry: &str) -> bool {
    name.strip_suffix(entry).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

impl Selection<'_> {
    /// Checks everything that can be checked without a model.
    ///
    /// # Errors
    /// [`Error::Config`] names the field; [`Error::Pattern`] the pattern that does not compile.
    pub fn check(&self) -> Result<(), Error> {
        check_names("target_modules", self.target_modules)?;
        if let Some(excluded) = self.exclude_modules {
            check_names("exclude_modules", excluded)?;
        }
        self.check_layer_keys()?;
        // An empty entry would match every module: the rule is "ends with".
        if self.modules_to_save.iter().any(String::is_empty) {
            return config_error("modules_to_save", "an entry is empty; remove it".to_owned());
        }
        Selector::new(self)?;
        Ok(())
    }

    fn check_layer_keys(&self) -> Result<(), Error> {
        let has_pattern = self.layers_pattern.is_some_and(|patterns| patterns.as_slice().iter().any(|p| !p.is_empty()));
        if let ModuleSelection::Pattern(text) = self.target_modules {
            for (field, given) in [
                ("layers_to_transform", self.layers_to_transform.is_some()),
                ("layers_pattern", self.layers_pattern.is_some()),
            ] {
                if given {
                    return config_error(
                        field,
                        format!(
                            "works only when target_modules is a list, and it is \"{text}\"; list the modules, or choose the layers in the regular expression"
                        ),
                    );
                }
            }
        }
        if has_pattern && self.layers_to_transform.is_none() {
            return config_error(
                "layers_pattern",
                "has no effect without layers_to_transform; give the layers or remove it".to_owned(),
            );
        }
        Ok(())
    }

    /// The modules that are adapted, in the modules' order.
    ///
    /// Stricter than PEFT: every entry of a list, every excluded name and every layer number must have an effect.
    ///
    /// # Errors
    /// [`Error::NoTarget`] and [`Error::UnknownModule`] with the nearest names; [`Error::SavedAndAdapted`]; [`Error::Config`] for layers without
    /// effect.
    pub fn resolve<'m, 'n>(&self, modules: &'m [LinearModule<'n>]) -> Result<Vec<&'m LinearModule<'n>>, Error> {
        let selector = Selector::new(self)?;
        check_entries("target_modules", self.target_modules, modules)?;
        if let Some(excluded) = self.exclude_modules {
            check_entries("exclude_modules", excluded, modules)?;
            let pattern = selector.exclude.as_ref();
            if let (ModuleSelection::Pattern(source), Some(names)) = (excluded, pattern)
                && !any(modules, |module| names.matches(module))?
            {
                return Err(unknown_module("exclude_modules", source, modules));
            }
        }
        check_layers(self, &selector, modules)?;
        let targets = self.select(modules)?;
        for target in &targets {
            if let Some(entry) = self.saved_by(target.name) {
                return Err(Error::SavedAndAdapted { entry: entry.to_owned(), module: target.name.to_owned() });
            }
        }
        Ok(targets)
    }

    /// The modules that are adapted, by PEFT's own rules: entries without effect are passed over.
    ///
    /// # Errors
    /// [`Error::Pattern`]; [`Error::NoTarget`] when nothing at all is selected.
    pub fn select<'m, 'n>(&self, modules: &'m [LinearModule<'n>]) -> Result<Vec<&'m LinearModule<'n>>, Error> {
        let selector = Selector::new(self)?;
        let mut targets = Vec::new();
        let mut excluded = false;
        for module in modules {
            match selector.verdict(module)? {
                Verdict::Targeted => targets.push(module),
                Verdict::Excluded => excluded = true,
                Verdict::Unmatched => {}
            }
        }
        if targets.is_empty() {
            return Err(no_target(self, modules, excluded));
        }
        Ok(targets)
    }

    /// The modules that are trained and saved whole, in the order of `names` (the full names of all modules that hold weights).
    ///
    /// As in PEFT an entry matches every name that ends with it, also in the middle of a component: "norm" is every `input_layernorm` too.
    ///
    /// # Errors
    /// [`Error::UnknownModule`] with the nearest names when an entry matches nothing.
    pub fn resolve_modules_to_save(&self, names: &[&str]) -> Result<Vec<String>, Error> {
        for entry in self.modules_to_save {
            if !names.iter().any(|name| name.ends_with(entry.as_str())) {
                return Err(Error::UnknownModule {
                    field: "modules_to_save",
                    entry: entry.clone(),
                    advice: did_you_mean(entry, names.iter().copied()),
                    available: list_ends(names.iter().copied()),
                });
            }
        }
        Ok(names.iter().filter(|name| self.saved_by(name).is_some()).map(|name| (*name).to_owned()).collect())
    }

    /// The entry of `modules_to_save` that saves this module whole.
    pub(crate) fn saved_by(&self, module: &str) -> Option<&str> {
        self.modules_to_save.iter().map(String::as_str).find(|entry| module.ends_with(entry))
    }
}

fn any(
    modules: &[LinearModule<'_>],
    mut test: impl FnMut(&LinearModule<'_>) -> Result<bool, Error>,
) -> Result<bool, Error> {
    for module in modules {
        if test(module)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn check_entries(field: &'static str, selection: &ModuleSelection, modules: &[LinearModule<'_>]) -> Result<(), Error> {
    let ModuleSelection::List(entries) = selection else {
        return Ok(());
    };
    let unknown = entries.iter().find(|entry| !modules.iter().any(|module| is_name_or_end(module.name, entry)));
    match unknown {
        Some(entry) => Err(unknown_module(field, entry, modules)),
        None => Ok(()),
    }
}

fn check_layers(selection: &Selection<'_>, selector: &Selector, modules: &[LinearModule<'_>]) -> Result<(), Error> {
    if selection.layers_to_transform.is_some_and(|numbers| numbers.as_slice().is_empty()) {
        let problem = "the list is empty, and every layer would be adapted; give the layers, or remove it".to_owned();
        return Err(Error::Config { field: "layers_to_transform", problem });
    }
    let given = selection.layers_pattern.map(|given| given.as_slice());
    if given.is_some_and(|given| given.is_empty() || given.iter().any(String::is_empty)) {
        let problem = "it or an entry of it is empty; name the list of layers (\"layers\"), or remove it".to_owned();
        return Err(Error::Config { field: "layers_pattern", problem });
    }
    let Some(layers) = &selector.layers else {
        return Ok(());
    };
    if given.is_some() {
        let names: Vec<&str> = modules.iter().map(|module| module.name).collect();
        check_each_counts("layers_pattern", &layers.patterns, &names, |_| numbered_lists(&names))?;
    }
    let mut present = BTreeSet::new();
    for module in modules {
        present.extend(layers.number_of(module.name)?);
    }
    let Some(missing) = layers.numbers.iter().find(|number| !present.contains(*number)) else {
        return Ok(());
    };
    let known = match (present.first(), present.last()) {
        (Some(first), Some(last)) => format!("the layers of this model are {first} to {last}"),
        _ => "no module of this model has a layer's number: remove layers_to_transform".to_owned(),
    };
    Err(Error::Config { field: "layers_to_transform", problem: format!("layer {missing} does not exist; {known}") })
}

/// Refuses a pattern that is not for any name the first that matches. `advice` is for one that matches none at all.
pub(crate) fn check_each_counts<'p>(
    field: &'static str,
    patterns: impl IntoIterator<Item = &'p Pattern>,
    names: &[&str],
    advice: impl Fn(&str) -> String,
) -> Result<(), Error> {
    // The pattern that takes each name.
    let mut takers: Vec<Option<&Pattern>> = vec![None; names.len()];
    for pattern in patterns {
        let mut counts = false;
        let mut shadow = None;
        for (name, taker) in names.iter().zip(&mut takers) {
            if !pattern.is_match(name)? {
                continue;
            }
            match *taker {
                Some(earlier) => shadow = shadow.or(Some((earlier, *name))),
                None => {
                    *taker = Some(pattern);
                    counts = true;
                }
            }
        }
        if counts {
            continue;
        }
        let entry = pattern.source().to_owned();
        return Err(match shadow {
            Some((earlier, module)) => {
                Error::ShadowedPattern { field, entry, earlier: earlier.source().to_owned(), module: module.to_owned() }
            }
            None => Error::UnknownModule {
                field,
                advice: advice(&entry),
                entry,
                available: list_ends(names.iter().copied()),
            },
        });
    }
    Ok(())
}

fn unknown_module(field: &'static str, entry: &str, modules: &[LinearModule<'_>]) -> Error {
    let names = modules.iter().map(|module| module.name);
    Error::UnknownModule {
        field,
        entry: entry.to_owned(),
        advice: advice_for(entry, modules),
        available: list_ends(names),
    }
}

fn no_target(selection: &Selection<'_>, modules: &[LinearModule<'_>], excluded: bool) -> Error {
    let (asked, advice) = match selection.target_modules {
        ModuleSelection::Pattern(source) if modules.iter().any(|m| is_name_or_end(m.name, source)) => (
            format!("\"{source}\""),
            format!(
                "A string is a regular expression for the whole name: write the list [{source}], or \".*\\.{source}\"."
            ),
        ),
        ModuleSelection::Pattern(source) => (
            format!("\"{source}\""),
            if selection.target_modules.is_all_linear() {
                String::new()
            } else {
                "A string is a regular expression for the whole name, such as \".*\\.(q|v)_proj\".".to_owned()
            },
        ),
        ModuleSelection::List(entries) => (
            format!("[{}]", entries.join(", ")),
            entries.first().map(|entry| advice_for(entry, modules)).unwrap_or_default(),
        ),
    };
    let mut reasons = Vec::new();
    if excluded {
        reasons.push("exclude_modules or modules_to_save takes modules away.".to_owned());
    }
    if selection.layers_to_transform.is_some() {
        reasons.push("layers_to_transform (with layers_pattern) leaves no layer.".to_owned());
    }
    if !advice.is_empty() {
        reasons.push(advice);
    }
    Error::NoTarget { asked, reason: reasons.join(" "), available: list_ends(modules.iter().map(|module| module.name)) }
}

fn advice_for(entry: &str, modules: &[LinearModule<'_>]) -> String {
    if entry.eq_ignore_ascii_case("all-linear") || entry.eq_ignore_ascii_case("all_linear") {
        return "\"all-linear\" is a string of its own, not an entry of a list.".to_owned();
    }
    if entry.contains(['*', '(', '|', '[', '\\', '^', '$']) {
        return "A list holds names or ends of names; give a regular expression as one string.".to_owned();
    }
    if matches!(entry, "embed_tokens" | "wte") {
        return "Embeddings cannot be adapted, only trained whole: put them in modules_to_save.".to_owned();
    }
    did_you_mean(entry, modules.iter().map(|module| module.name))
}

/// "Did you mean `q_proj`?" for the ends of names, as long as what was asked, that look most like it.
pub(crate) fn did_you_mean<'a>(asked: &str, names: impl Iterator<Item = &'a str>) -> String {
    let components = asked.split('.').count();
    let ends: BTreeSet<&str> = names.map(|name| end_of(name, components)).collect();
    let asked = asked.to_lowercase();
    let mut scored: Vec<(f64, &str)> = ends
        .into_iter()
        .map(|end| (strsim::jaro_winkler(&asked, &end.to_lowercase()), end))
        .filter(|(score, _)| *score >= 0.7)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    let nearest: Vec<String> = scored.iter().take(3).map(|(_, end)| format!("`{end}`")).collect();
    if nearest.is_empty() {
        return String::new();
    }
    format!("Did you mean {}?", nearest.join(" or "))
}

/// What can stand in `layers_pattern`: "layers" for "model.layers.0.mlp.up_proj".
fn numbered_lists(names: &[&str]) -> String {
    let mut lists = BTreeSet::new();
    for name in names {
        let pairs = name.split('.').zip(name.split('.').skip(1));
        lists.extend(pairs.filter(|(_, next)| next.parse::<usize>().is_ok()).map(|(list, _)| format!("`{list}`")));
    }
    if lists.is_empty() {
        return "No name has a layer's number: remove layers_pattern and layers_to_transform.".to_owned();
    }
    let lists: Vec<String> = lists.into_iter().collect();
    format!("Numbers follow {} in the names.", lists.join(" and "))
}

/// The last `components` components of a name.
fn end_of(name: &str, components: usize) -> &str {
    match name.rmatch_indices('.').nth(components.saturating_sub(1)) {
        Some((dot, _)) => name.get(dot + 1..).unwrap_or(name),
        None => name,
    }
}

/// "q_proj (30), k_proj (30), lm_head (1)".
pub(crate) fn list_ends<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let listed: Vec<String> = count_ends(names).iter().map(|(end, count)| format!("{end} ({count})")).collect();
    listed.join(", ")
}

fn check_names(field: &'static str, selection: &ModuleSelection) -> Result<(), Error> {
    match selection {
        ModuleSelection::List(names) if names.is_empty() => {
            config_error(field, "the list is empty; name modules".to_owned())
        }
        ModuleSelection::List(names) if names.iter().any(String::is_empty) => {
            config_error(field, "an entry is empty; remove it".to_owned())
        }
        ModuleSelection::Pattern(text) if text.is_empty() => {
            config_error(field, "the regular expression is empty; write one, or a list of names".to_owned())
        }
        _ => Ok(()),
    }
}
