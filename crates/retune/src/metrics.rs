//! `metrics.jsonl`, read back: what each step of a run and each score of its held-out rows was.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A step of a run, or a score of its held-out rows, in a curve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    pub step: u64,
    /// Of the step's rows, smoothed over the steps before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Of the held-out rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// Trained on so far.
    #[serde(default)]
    pub tokens: u64,
    /// In steps so far.
    pub seconds: f64,
}

/// The lines of a run's metrics; a last one that a kill cut off, or that is being written, is left out.
///
/// # Errors
/// A file that cannot be read or is damaged.
pub fn read(path: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let line = |line| serde_json::from_str(line).with_context(|| format!("{} is damaged", path.display()));
    whole.lines().map(line).collect()
}

/// Points of a curve at most.
const MOST_POINTS: usize = 200;
/// What the steps before count for in a smoothed loss.
const SMOOTHING: f64 = 0.9;

/// The curve that metrics make.
pub fn curve(metrics: &[Value]) -> Vec<Point> {
    let (mut sum, mut weight, mut seconds, mut tokens) = (0.0, 0.0, 0.0, 0);
    let mut points = Vec::new();
    for line in metrics {
        let step = line["step"].as_u64().unwrap_or_default();
        seconds += line["seconds"].as_f64().unwrap_or_default();
        tokens += line["tokens"].as_u64().unwrap_or_default();
        let point = Point { step, loss: None, validation_loss: None, tokens, seconds };
        if let Some(loss) = line["loss"].as_f64() {
            // Divided by the weights, so that the first steps are not drawn towards 0 (as Adam corrects its means).
            sum = SMOOTHING * sum + (1.0 - SMOOTHING) * loss;
            weight = SMOOTHING * weight + (1.0 - SMOOTHING);
            points.push(Point { loss: Some(sum / weight), ..point });
        } else if let Some(loss) = line["eval_loss"].as_f64() {
            points.push(Point { validation_loss: Some(loss), ..point });
        }
    }
    let every = points.len().div_ceil(MOST_POINTS).max(1);
    let last = points.len().saturating_sub(1);
    let kept = points.into_iter().enumerate();
    let kept = kept.filter(|(at, point)| at % every == 0 || *at == last || point.validation_loss.is_some());
    kept.map(|(_, point)| point).collect()
}

/// The most memory that any process had that took steps of the run.
pub fn peak_memory(metrics: &[Value]) -> Option<u64> {
    metrics.iter().filter_map(|line| line["peak_rss_bytes"].as_u64()).max()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_curve_is_smoothed_and_keeps_every_validation() {
        let mut lines = vec![json!({"step": 0, "eval_loss": 3.0, "eval_label_tokens": 9})];
        lines.extend((1..=500).map(|step| json!({"step": step, "loss": 2.0, "tokens": 3, "seconds": 0.5})));
        lines.push(json!({"step": 500, "eval_loss": 1.0, "eval_label_tokens": 9}));
        let points = curve(&lines);
        assert!((100..=MOST_POINTS + 2).contains(&points.len()), "{}", points.len());
        assert!(points.iter().filter_map(|point| point.loss).all(|loss| (loss - 2.0).abs() < 1e-9));
        let scored: Vec<_> = points.iter().filter_map(|point| Some((point.step, point.validation_loss?))).collect();
        assert_eq!(scored, [(0, 3.0), (500, 1.0)]);
        assert_eq!(points.last().map(|point| (point.seconds, point.tokens)), Some((250.0, 1500)));
    }

    #[test]
    fn a_last_line_that_was_cut_off_is_left_out_and_another_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"st").unwrap();
        assert_eq!(read(&path).unwrap().len(), 2);
        fs::write(&path, "{\"step\":1}\n{\"st\n{\"step\":3}\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("metrics.jsonl is damaged"));
        fs::write(&path, "").unwrap();
        assert!(read(&path).unwrap().is_empty());
    }
}
