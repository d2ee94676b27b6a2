//! The answer in three sentences: which method, what it costs against full fine-tuning, how sure that is.

use retune_eval::bootstrap::Difference;
use retune_train::plan::BASE;
use serde::Serialize;

use super::decide::Decided;
use super::results::{Failure, Summary};
use super::rows::Rows;
use crate::memory::human;

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// The one to take: of those that these rows cannot tell from the best, the one with the fewest trained parameters.
    pub variant: String,
    /// The one of the least loss.
    pub best: String,
    pub sentences: [String; 3],
}

/// The variant of the least loss, and the one to take: by held-out loss, which tells more than accuracy with as many rows.
pub fn choose(variants: &[Summary]) -> Option<(&Summary, &Summary)> {
    let best = variants.iter().min_by(|a, b| a.loss.total_cmp(&b.loss))?;
    let cannot_be_told = |of: &&Summary| {
        of.name == best.name || of.loss_against_best.as_ref().is_some_and(|difference| !difference.is_sure())
    };
    let chosen = variants.iter().filter(cannot_be_told).min_by_key(|of| of.trainable_parameters)?;
    Some((best, chosen))
}

/// The answer.
pub fn of(variants: &[Summary], decided: &Decided, rows: &Rows, failed: &[Failure]) -> Answer {
    let Some((best, chosen)) = choose(variants) else {
        let nothing = "No run was finished, so there is nothing to compare.".to_owned();
        return Answer {
            variant: String::new(),
            best: String::new(),
            sentences: [nothing, String::new(), String::new()],
        };
    };
    let base = variants.iter().find(|summary| summary.name == BASE);
    let full = variants.iter().find(|summary| summary.is_full());
    Answer {
        variant: chosen.name.clone(),
        best: best.name.clone(),
        sentences: [
            which(chosen, best, base, variants),
            cost(chosen, full, decided, failed),
            sure(chosen, variants, rows),
        ],
    }
}

fn which(chosen: &Summary, best: &Summary, base: Option<&Summary>, variants: &[Summary]) -> String {
    let count = variants.len();
    let against = match base {
        Some(base) if base.name != chosen.name => {
            format!(" ({:.3}; the base as it is has {:.3})", chosen.loss, base.loss)
        }
        _ => format!(" ({:.3})", chosen.loss),
    };
    if chosen.name == BASE {
        return match best.name == BASE {
            true => {
                format!("Leave the model as it is: none of the {count} ways tried has a lower held-out loss{against}.")
            }
            false => format!(
                "Leave the model as it is, or look again with more rows: {} has the lowest held-out loss, {:.3}, but these rows cannot tell it from \
                 the base{against}.",
                best.name, best.loss
            ),
        };
    }
    let take = if chosen.trains() { "Use" } else { "Train nothing and use the" };
    if chosen.name == best.name {
        return format!(
            "{take} {}: of the {count} ways tried it has the lowest loss on held-out rows{against}, and none with fewer trained parameters comes as low.",
            chosen.name
        );
    }
    format!(
        "{take} {}: its loss on held-out rows{against} cannot be told from the lowest, {:.3} of {}, and it trains {} parameters in place of {}.",
        chosen.name,
        best.loss,
        best.name,
        grouped(chosen.trainable_parameters),
        grouped(best.trainable_parameters)
    )
}

fn cost(chosen: &Summary, full: Option<&Summary>, decided: &Decided, failed: &[Failure]) -> String {
    let Some(full) = full else {
        let left_out = decided.left_out.iter().find(|left_out| left_out.name == "full fine-tuning");
        let failed = failed.iter().find(|failure| failure.name == "full fine-tuning");
        return match (left_out, failed) {
            (Some(left_out), _) => format!("Full fine-tuning was left out: {}.", left_out.reason),
            (_, Some(failure)) => {
                format!("What it costs against full fine-tuning is not known, whose run failed: {}.", failure.error)
            }
            _ => {
                "Full fine-tuning was not among the ways tried, so what is given up against it is not known.".to_owned()
            }
        };
    };
    if chosen.name == full.name {
        return format!(
            "Nothing smaller came as low: it trains all {} parameters, in {}, and leaves a model of {}.",
            grouped(full.trainable_parameters),
            taken(full),
            human(full.bytes)
        );
    }
    if !chosen.trains() {
        return format!("Full fine-tuning came to a loss of {:.3}, in {}.", full.loss, taken(full));
    }
    let share = match chosen.share_of_full_gain {
        Some(share) if share >= 1.0 => format!("It gains {:.0}% of what full fine-tuning gains in loss", 100.0 * share),
        Some(share) => format!("It reaches {:.0}% of full fine-tuning's gain in loss", 100.0 * share),
        None => "Full fine-tuning gains nothing here that it could miss; it works".to_owned(),
    };
    format!(
        "{share}, with {}% of its trained parameters and a file of {} in place of {}, in {} in place of {}.",
        percent(chosen.trainable_parameters, full.trainable_parameters),
        human(chosen.bytes),
        human(full.bytes),
        taken(chosen),
        taken(full)
    )
}

fn sure(chosen: &Summary, variants: &[Summary], rows: &Rows) -> String {
    let count = rows.held_out_rows;
    let seeds = match chosen.runs.len() {
        1 if chosen.trains() => ", with one seed, so that the chance in training is not in it".to_owned(),
        1 => String::new(),
        seeds => {
            let (low, high) = chosen.loss_range();
            format!(", over {seeds} seeds, whose losses go from {low:.3} to {high:.3}")
        }
    };
    // The next one is who it could have been instead.
    let others = || variants.iter().filter(|of| of.name != chosen.name && of.name != BASE);
    let next =
        others().min_by(|a, b| a.loss.total_cmp(&b.loss)).and_then(|of| Some((of, of.loss_against_chosen.as_ref()?)));
    let next = next.map_or_else(String::new, |(of, difference)| {
        let Difference { estimate, low, high, detectable } = difference;
        format!(
            " The nearest other is {}, {estimate:+.3} from it [{low:+.3}, {high:+.3}]; a difference under {detectable:.3} between the two could not be \
             seen with so few rows.",
            of.name
        )
    });
    let against = match &chosen.loss_against_base {
        Some(Difference { low, high, .. }) => {
            let (side, near, far) = if *high < 0.0 { ("below", -high, -low) } else { ("above", *low, *high) };
            format!(
                "With 95% confidence its loss is {near:.3} to {far:.3} {side} the base's on rows such as these {count} (paired bootstrap){seeds}."
            )
        }
        None => format!("It was scored on {count} held-out rows{seeds}."),
    };
    format!("{against}{next}")
}

/// Time and memory of training.
fn taken(summary: &Summary) -> String {
    let memory = summary.peak_rss_bytes.map_or_else(String::new, |bytes| format!(" and {} of memory", human(bytes)));
    format!("{}{memory}", duration(summary.seconds))
}

/// Seconds as people say them.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 5_400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3_600.0),
    }
}

/// A share with as many digits as say something.
fn percent(part: u64, whole: u64) -> String {
    let share = 100.0 * part as f64 / whole.max(1) as f64;
    let digits = if share >= 10.0 {
        0
    } else if share >= 1.0 {
        1
    } else if share >= 0.1 {
        2
    } else {
        3
    };
    format!("{share:.digits$}")
}

/// A count with its digits in groups of three.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1_000, 134_515_008].map(grouped), ["0", "999", "1,000", "134,515,008"]);
        assert_eq!([0.26, 42.4, 61.0, 300.0, 7_200.0].map(duration), ["0.3 s", "42 s", "61 s", "5 min", "2.0 h"]);
        assert_eq!([(1, 2), (1, 50), (1, 500), (1, 5000)].map(|(a, b)| percent(a, b)), ["50", "2.0", "0.20", "0.020"]);
    }
}
