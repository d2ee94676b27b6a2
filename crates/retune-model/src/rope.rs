//! Rotary position embedding: from a configuration's fields to the frequencies of a [`Rope`].
//!
//! Both spellings are read: `rope_scaling` beside a top-level `rope_theta` (transformers 4), and `rope_parameters` (transformers 5).
//! Where a file has both, transformers takes the older one as a whole. The formulas are those of transformers' `modeling_rope_utils`,
//! every intermediate result rounded to f32 where it rounds it.

use retune_engine::spec::{LongFrequencies, LongRope, Rope, frequencies};
use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::fields::{Fields, field_error, unsupported};

/// What a model's rotation depends on besides its own fields.
#[derive(Clone, Copy, Debug)]
pub struct Rotary {
    pub head_dim: usize,
    /// `max_position_embeddings`.
    pub context: usize,
    /// `rope_theta` where it is nowhere given.
    pub default_theta: f64,
}

/// The kind of scaling that a GGUF file's `rope_freqs.weight` gives where no kind of transformers fits; no `config.json` has it.
pub const GGUF_FACTORS: &str = "gguf";

const ORIGINAL: &str = "original_max_position_embeddings";
const PARTIAL: &str = "partial_rotary_factor";
const KINDS: &str = "default, linear, llama3, yarn, dynamic, longrope, proportional";

impl Rotary {
    /// The rotation of a model with one for all layers, which turns whole heads.
    ///
    /// # Errors
    /// A kind that is not supported, and impossible values.
    pub fn read(&self, c: &Fields<'_>) -> Result<Rope, Error> {
        self.of(&self.parameters(c)?)
    }

    /// The one object that describes the rotation, with what stands beside it filled in.
    ///
    /// # Errors
    /// Objects by type of layer, and what is no object.
    pub fn parameters(&self, c: &Fields<'_>) -> Result<Map<String, Value>, Error> {
        let old = c.object("rope_scaling")?.filter(|object| !object.is_empty());
        let mut parameters = old.or(c.object("rope_parameters")?).cloned().unwrap_or_default();
        if let Some((name, value)) = parameters.iter().find(|(_, value)| value.is_object()) {
            let found = format!("{name}: {value}");
            return Err(unsupported("rotary embedding by layer type,", found, "one for all layers"));
        }
        fill(&mut parameters, "rope_theta", c.get("rope_theta"));
        fill(&mut parameters, PARTIAL, c.get(PARTIAL));
        // What a file says outside wins here.
        if let Some(length) = c.find_size(ORIGINAL)? {
            parameters.insert(ORIGINAL.to_owned(), length.into());
        }
        Ok(parameters)
    }

    /// The rotation of whole heads that these parameters describe.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn of(&self, parameters: &Map<String, Value>) -> Result<Rope, Error> {
        let c = Parameters { fields: Fields::new(parameters), kind: kind(parameters)? };
        if c.kind == "proportional" {
            return self.proportional(&c);
        }
        if let Some(part) = c.fields.find_number(PARTIAL)?.filter(|&part| part != 1.0) {
            return Err(unsupported(PARTIAL, part, "1"));
        }
        self.of_part(parameters)
    }

    /// The rotation of the part of each head that `partial_rotary_factor` says.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn of_part(&self, parameters: &Map<String, Value>) -> Result<Rope, Error> {
        let c = Parameters { fields: Fields::new(parameters), kind: kind(parameters)? };
        let part = c.part()?;
        let rotated = (self.head_dim as f64 * part) as usize;
        if rotated == 0 || !rotated.is_multiple_of(2) {
            return Err(if part == 1.0 {
                field_error("head_dim", self.head_dim, "an even number, for rotary embedding")
            } else {
                let expected = format!("a part of head_dim, {}, that is an even number", self.head_dim);
                field_error(PARTIAL, part, expected)
            });
        }
        let theta = c.theta(self.default_theta)?;
        let plain = frequencies(theta, rotated);
        let rope = match c.kind.as_str() {
            "default" => Rope::new(plain),
            "linear" => {
                let factor = c.positive("factor")? as f32;
                Rope::new(each(&plain, |frequency| frequency / factor))
            }
            "llama3" => Rope::new(c.llama3(&plain, self.context)?),
            "dynamic" => {
                let factor = c.positive("factor")?;
                if rotated == 2 {
                    return Err(field_error("head_dim", self.head_dim, "more than 2 with rope_type dynamic"));
                }
                let long = LongRope { beyond: self.context, frequencies: LongFrequencies::Dynamic { theta, factor } };
                Rope { long: Some(long), ..Rope::new(plain) }
            }
            "yarn" => c.yarn(theta, rotated, self.context)?,
            "longrope" => c.longrope(theta, rotated, self.context)?,
            GGUF_FACTORS => {
                let factors = c.factors("factors", rotated)?;
                Rope::new(zip(&plain, &factors, |frequency, by| frequency / by))
            }
            other => return Err(unsupported("rope_type", other, KINDS)),
        };
        check(rope, theta)
    }

    /// All dimensions are turned, but those beyond the first part by nothing.
    fn proportional(&self, c: &Parameters<'_>) -> Result<Rope, Error> {
        if !self.head_dim.is_multiple_of(2) {
            return Err(field_error("head_dim", self.head_dim, "an even number, for rotary embedding"));
        }
        let theta = c.theta(self.default_theta)?;
        let factor = c.fields.find_number("factor")?.map_or(Ok(1.0), |_| c.positive("factor"))? as f32;
        let turned = (c.part()? * self.head_dim as f64 / 2.0) as usize;
        let mut rope = Rope::new(each(&frequencies(theta, self.head_dim), |frequency| frequency / factor));
        rope.frequencies.iter_mut().skip(turned).for_each(|frequency| *frequency = 0.0);
        check(rope, theta)
    }
}

/// Sets what is missing or null.
pub fn fill(parameters: &mut Map<String, Value>, name: &str, value: Option<&Value>) {
    if let Some(value) = value
        && parameters.get(name).is_none_or(Value::is_null)
    {
        parameters.insert(name.to_owned(), value.clone());
    }
}

fn kind(parameters: &Map<String, Value>) -> Result<String, Error> {
    match parameters.get("rope_type").or(parameters.get("type")) {
        None | Some(Value::Null) => Ok("default".to_owned()),
        Some(Value::String(kind)) => Ok(kind.clone()),
        Some(other) => Err(field_error("rope_type", other, "a string")),
    }
}

/// Arithmetic in f32 on frequencies, which are f32 values.
fn each(plain: &[f64], change: impl Fn(f32) -> f32) -> Vec<f64> {
    plain.iter().map(|&frequency| f64::from(change(frequency as f32))).collect()
}

fn zip(plain: &[f64], factors: &[f32], change: impl Fn(f32, f32) -> f32) -> Vec<f64> {
    plain.iter().zip(factors).map(|(&frequency, &by)| f64::from(change(frequency as f32, by))).collect()
}

/// Refuses a rotation whose angles are no numbers.
fn check(rope: Rope, theta: f64) -> Result<Rope, Error> {
    let fixed = match &rope.long {
        Some(LongRope { frequencies: LongFrequencies::Fixed(long), .. }) => long.as_slice(),
        _ => &[],
    };
    if rope.frequencies.iter().chain(fixed).any(|frequency| !frequency.is_finite()) || !rope.factor.is_finite() {
        return Err(field_error("rope_theta", theta, "a number that, with its scaling, gives finite frequencies"));
    }
    Ok(rope)
}

/// The parameters of one rotation.
struct Parameters<'a> {
    fields: Fields<'a>,
    kind: String,
}

impl Parameters<'_> {
    fn theta(&self, default: f64) -> Result<f64, Error> {
        let theta = self.fields.find_number("rope_theta")?.unwrap_or(default);
        if theta > 0.0 && theta.is_finite() {
            return Ok(theta);
        }
        Err(field_error("rope_theta", theta, "a number above 0"))
    }

    /// The part of a head that is turned.
    fn part(&self) -> Result<f64, Error> {
        match self.fields.find_number(PARTIAL)? {
            None => Ok(1.0),
            Some(part) if part > 0.0 && part <= 1.0 => Ok(part),
            Some(part) => Err(field_error(PARTIAL, part, "a number above 0 and at most 1")),
        }
    }

    fn positive(&self, name: &str) -> Result<f64, Error> {
        match self.fields.find_number(name)? {
            Some(value) if value > 0.0 => Ok(value),
            found => {
                let found = found.map_or("missing".to_owned(), |value| value.to_string());
                Err(field_error(name, found, format!("a number above 0, as rope_type {} needs", self.kind)))
            }
        }
    }

    /// A number above 0 where it is given.
    fn find_positive(&self, name: &str) -> Result<Option<f64>, Error> {
        self.fields.find_number(name)?.map(|_| self.positive(name)).transpose()
    }

    /// The ratio of the lengths after and before the context was extended: a field of its own, or what the lengths say.
    fn ratio(&self, context: usize, original: usize) -> Result<f64, Error> {
        Ok(self.find_positive("factor")?.unwrap_or(context as f64 / original as f64))
    }

    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, those between blended.
    fn llama3(&self, plain: &[f64], context: usize) -> Result<Vec<f64>, Error> {
        let (low, high) = (self.positive("low_freq_factor")?, self.positive("high_freq_factor")?);
        if high <= low {
            return Err(field_error("high_freq_factor", high, "a number above low_freq_factor"));
        }
        let factor = self.positive("factor")? as f32;
        let original = self.fields.size(ORIGINAL, context)? as f64;
        Ok(each(plain, |frequency| {
            let wavelength = (2.0 * std::f64::consts::PI) as f32 / frequency;
            if wavelength < (original / high) as f32 {
                frequency
            } else if wavelength > (original / low) as f32 {
                frequency / factor
            } else {
                let smooth = (original as f32 / wavelength - low as f32) / (high - low) as f32;
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }))
    }

    /// YaRN (Peng et al. 2023): high frequencies kept, low ones divided by `factor`, a ramp between them.
    fn yarn(&self, theta: f64, d: usize, context: usize) -> Result<Rope, Error> {
        if self.fields.get("factor").is_none() {
            self.positive("factor")?;
        }
        let original = self.fields.size(ORIGINAL, context)?;
        let factor = self.ratio(context, original)?;
        let scale_of = |scale: f64, m: f64| if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 };
        let or_zero = |name: &str| Ok::<_, Error>(self.fields.find_number(name)?.unwrap_or(0.0));
        let (mscale, mscale_all_dim) = (or_zero("mscale")?, or_zero("mscale_all_dim")?);
        let on_cosines = match self.find_positive("attention_factor")? {
            Some(given) => given,
            None if mscale != 0.0 && mscale_all_dim != 0.0 => {
                scale_of(factor, mscale) / scale_of(factor, mscale_all_dim)
            }
            None => scale_of(factor, 1.0),
        };
        let or_default = |name: &str, default: f64| {
            Ok::<_, Error>(match or_zero(name)? {
                0.0 => default,
                given => given,
            })
        };
        // The dimension that turns so many times over the original length.
        let dimension =
            |turns: f64| d as f64 * (original as f64 / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (dimension(or_default("beta_fast", 32.0)?), dimension(or_default("beta_slow", 1.0)?));
        if self.fields.flag("truncate", true)? {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(d as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let (low, width, factor) = (low as f32, (high - low) as f32, factor as f32);
        let frequency = |i: usize| {
            let position = theta.powf(f64::from((2 * i) as f32 / d as f32)) as f32;
            let kept = 1.0 - ((i as f32 - low) / width).clamp(0.0, 1.0);
            f64::from(1.0 / (factor * position) * (1.0 - kept) + 1.0 / position * kept)
        };
        Ok(Rope { factor: on_cosines as f32, ..Rope::new((0..d / 2).map(frequency).collect()) })
    }

    /// LongRoPE (Ding et al. 2024): a factor for each frequency, others for rows beyond the original length.
    fn longrope(&self, theta: f64, d: usize, context: usize) -> Result<Rope, Error> {
        let original = self.fields.size(ORIGINAL, context)?;
        let ratio = self.ratio(context, original)?;
        let factor = match self.find_positive("attention_factor")? {
            Some(given) => given,
            None if ratio <= 1.0 => 1.0,
            None if original == 1 => return Err(field_error(ORIGINAL, original, "a length above 1")),
            None => (1.0 + ratio.ln() / (original as f64).ln()).sqrt(),
        };
        let scaled = |name: &str| {
            let factors = self.factors(name, d)?;
            let frequency = |(i, by): (usize, &f32)| {
                f64::from(1.0 / (by * theta.powf(f64::from((2 * i) as f32 / d as f32)) as f32))
            };
            Ok::<_, Error>(factors.iter().enumerate().map(frequency).collect::<Vec<_>>())
        };
        let long = LongRope { beyond: original, frequencies: LongFrequencies::Fixed(scaled("long_factor")?) };
        Ok(Rope { frequencies: scaled("short_factor")?, factor: factor as f32, long: Some(long) })
    }

    /// A factor for each frequency.
    fn factors(&self, name: &str, d: usize) -> Result<Vec<f32>, Error> {
        let expected = format!("{} numbers above 0, half of the dimensions that are turned", d / 2);
        let number = |value: &Value| value.as_f64().map(|value| value as f32).filter(|v| *v > 0.0 && v.is_finite());
        match self.fields.list(name, &expected, number)? {
            Some(factors) if factors.len() == d / 2 => Ok(factors),
            Some(factors) => Err(field_error(name, format!("a list of {}", factors.len()), expected)),
            None => Err(field_error(name, "missing", expected)),
        }
    }
}

/// The scaling of transformers that divides each frequency by these factors, as the parameters of a `config.json`.
///
/// Llama 3's models all have low and high frequency factors 1 and 4; the original context length is searched among powers of two.
pub fn scaling_of_factors(theta: f64, factors: &[f32]) -> Option<Map<String, Value>> {
    let factor = f64::from(*factors.last()?);
    let mut candidates = vec![json!({"rope_type": "default"}), json!({"rope_type": "linear", "factor": factor})];
    candidates.extend((4..32).map(|log2| {
        json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1u64 << log2})
    }));
    let rotary = Rotary { head_dim: 2 * factors.len(), context: 1, default_theta: theta };
    let wanted = zip(&frequencies(theta, rotary.head_dim), factors, |frequency, by| frequency / by);
    candidates.into_iter().find_map(|candidate| {
        let Value::Object(parameters) = candidate else { return None };
        let found = rotary.of(&parameters).ok()?.frequencies;
        let fits = found.iter().zip(&wanted).all(|(found, wanted)| (found / wanted - 1.0).abs() < 1e-5);
        fits.then_some(parameters)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(head_dim: usize, context: usize, parameters: Value) -> Result<Rope, Error> {
        Rotary { head_dim, context, default_theta: 1e4 }.of(parameters.as_object().unwrap())
    }

    /// A scaling of heads of 8 dimensions in a model for 64 positions.
    fn small(parameters: Value) -> Rope {
        rope(8, 64, parameters).unwrap()
    }

    fn refusal(parameters: Value) -> String {
        rope(8, 64, parameters).unwrap_err().to_string()
    }

    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            let equal = found == expected || (found / expected - 1.0).abs() < 2e-7;
            assert!(equal, "{found} {expected}");
        }
    }

    /// Expected values: `inv_freq` of transformers 5.23.0's LlamaRotaryEmbedding.
    #[test]
    fn llama3_frequencies_are_those_of_transformers() {
        let llama3 = |theta: f64, head_dim, factor: f64, original: usize| {
            let parameters = json!({"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": original});
            rope(head_dim, 131_072, parameters).unwrap().frequencies
        };
        let expected = [1.0, 0.04275117814540863, 0.0012499999720603228, 0.0001250000059371814];
        close(&llama3(10000.0, 8, 8.0, 128), &expected);
        let llama = llama3(500000.0, 64, 32.0, 8192);
        let picked = [1, 8, 14, 15, 16, 17, 18, 31].map(|i| llama[i]);
        let expected = [
            0.663601279258728,
            0.03760603070259094,
            0.0032114461064338684,
            0.0012905480107292533,
            0.000429556705057621,
            9.708286233944818e-05,
            1.9461638657958247e-05,
            9.418306490260875e-08,
        ];
        close(&picked, &expected);
    }

    #[test]
    fn plain_linear_and_factor_frequencies() {
        close(&small(json!({})).frequencies, &[1.0f32, 0.1, 0.01, 0.001].map(f64::from));
        let linear = small(json!({"type": "linear", "factor": 4.0}));
        close(&linear.frequencies, &[0.25f32, 0.025, 0.0025, 0.00025].map(f64::from));
        let halved = small(json!({"rope_type": GGUF_FACTORS, "factors": [1.0, 2.0, 1.0, 8.0]}));
        close(&halved.frequencies, &[1.0f32, 0.05, 0.01, 0.000125].map(f64::from));
    }

    /// Expected values: transformers 5.23.0.
    #[test]
    fn other_scalings_are_those_of_transformers() {
        let settings = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096,
            "beta_fast": 20.0, "beta_slow": 2.0, "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": false});
        let yarn = rope(64, 64, settings).unwrap();
        let picked = [1, 12, 13, 16, 20, 21].map(|i| yarn.frequencies[i]);
        let expected = [YARN_1, YARN_12, YARN_13, YARN_16, YARN_20, YARN_21];
        close(&picked, &expected);
        assert_eq!(yarn.factor, 1.038_893);
        let usual = small(json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}));
        close(&usual.frequencies[..2], &[1.0, 0.02500000037252903]);
        assert_eq!(usual.factor, (0.1 * 4f64.ln() + 1.0) as f32);

        let (short, long) = (json!([1.0, 1.25, 1.5, 1.75]), json!([2.0, 2.5, 3.0, 3.5]));
        let longrope = small(json!({"rope_type": "longrope", "short_factor": short, "long_factor": long,
            "original_max_position_embeddings": 16}));
        close(&longrope.frequencies_at(16)[..2], &[1.0, 0.07999999821186066]);
        close(&longrope.frequencies_at(17)[..2], &[0.5, 0.03999999910593033]);
        assert_eq!(longrope.factor, (1.0 + 4f64.ln() / 16f64.ln()).sqrt() as f32);

        let dynamic = small(json!({"rope_type": "dynamic", "factor": 2.0}));
        close(&dynamic.frequencies_at(64)[..2], &[1.0, 0.1f32.into()]);
        close(&dynamic.frequencies_at(80)[..2], &[1.0, 0.08735804259777069]);

        let proportional = small(json!({"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0}));
        close(&proportional.frequencies, &[0.5, 0.05000000074505806, 0.0, 0.0]);
    }

    const YARN_1: f64 = 0.7498942017555237;
    const YARN_12: f64 = 0.03162277862429619;
    const YARN_13: f64 = 0.021724451333284378;
    const YARN_16: f64 = 0.006348625756800175;
    const YARN_20: f64 = 0.0008217576541937888;
    const YARN_21: f64 = 0.0005928434547968209;

    #[test]
    fn impossible_scalings_are_refused_by_field() {
        for (parameters, field) in [
            (json!({"rope_type": "linear", "factor": -1.0}), "factor"),
            (json!({"rope_type": "yarn", "original_max_position_embeddings": 16}), "factor"),
            (json!({"rope_type": "longrope", "short_factor": [1, 1, 1, 1]}), "long_factor"),
            (json!({"rope_type": "longrope", "short_factor": [1], "long_factor": [1, 1, 1, 1]}), "short_factor"),
            (
                json!({"rope_type": "longrope", "short_factor": [0, 1, 1, 1], "long_factor": [1, 1, 1, 1]}),
                "short_factor",
            ),
            (json!({"rope_type": 3}), "rope_type"),
            (json!({"rope_theta": 0}), "rope_theta"),
            (json!({"rope_theta": 1e-300}), "rope_theta"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            (json!({"rope_type": "proportional", "partial_rotary_factor": 2}), "partial_rotary_factor"),
        ] {
            let text = refusal(parameters.clone());
            assert!(text.contains(field), "{parameters}: {text}");
        }
        assert!(rope(7, 64, json!({})).unwrap_err().to_string().contains("head_dim"));
        assert!(rope(2, 64, json!({"rope_type": "dynamic", "factor": 2.0})).is_err());
    }

    /// Which of the fields count where several are there, as transformers 5.23.0 was seen to do.
    #[test]
    fn old_and_new_spellings_take_precedence_as_in_transformers() {
        let read = |config: Value| {
            let fields = config.as_object().unwrap();
            Rotary { head_dim: 8, context: 64, default_theta: 1e4 }.read(&Fields::new(fields)).unwrap()
        };
        let linear = |theta: f64, factor: f64| small(json!({"type": "linear", "rope_theta": theta, "factor": factor}));
        let plain = |theta: f64| small(json!({"rope_theta": theta}));
        let old = json!({"type": "linear", "factor": 4});
        let new = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 500000});
        assert_eq!(read(json!({"rope_theta": 5e5, "rope_scaling": old})), linear(5e5, 4.0));
        assert_eq!(read(json!({"rope_parameters": new})), linear(5e5, 2.0));
        assert_eq!(read(json!({"rope_scaling": old, "rope_parameters": new})), linear(1e4, 4.0));
        assert_eq!(read(json!({"rope_scaling": old, "rope_parameters": new, "rope_theta": 7e4})), linear(7e4, 4.0));
        assert_eq!(read(json!({"rope_parameters": new, "rope_theta": 7e4})), linear(5e5, 2.0));
        assert_eq!(read(json!({"rope_scaling": {}, "rope_parameters": new})), linear(5e5, 2.0));
        assert_eq!(
            read(json!({"rope_theta": 1e6, "rope_scaling": null, "rope_parameters": {"rope_type": "default"}})),
            plain(1e6)
        );
        assert_eq!(read(json!({})), plain(1e4));
        let llama3 = |original: usize| {
            small(json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": original}))
        };
        let mut scaling =
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
        assert_eq!(read(json!({"rope_scaling": scaling})), llama3(64));
        scaling["original_max_position_embeddings"] = json!(16);
        assert_eq!(read(json!({"rope_scaling": scaling})), llama3(16));
        assert_eq!(read(json!({"rope_scaling": scaling, "original_max_position_embeddings": 32})), llama3(32));
    }

    #[test]
    fn factors_are_recognised_as_the_scaling_they_come_from() {
        let parameters = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let rotary = Rotary { head_dim: 64, context: 1, default_theta: 5e5 };
        let scaled = rotary.of(parameters.as_object().unwrap()).unwrap().frequencies;
        let factors: Vec<f32> =
            frequencies(5e5, 64).iter().zip(&scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect();
        assert_eq!(scaling_of_factors(5e5, &factors).map(Value::Object), Some(parameters));
        assert_eq!(scaling_of_factors(1e4, &[2.0; 4]).unwrap()["rope_type"], "linear");
        assert_eq!(scaling_of_factors(1e4, &[1.0; 4]).unwrap()["rope_type"], "default");
        let none: Vec<f32> = (0..32).map(|i| 1.0 + i as f32).collect();
        assert_eq!(scaling_of_factors(1e4, &none), None);
        assert_eq!(scaling_of_factors(1e4, &[]), None);
    }
}
