//! How the learning rate changes over a run, as transformers' schedulers change it.

use std::f64::consts::PI;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the learning rate goes on after the warm-up, under transformers' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    /// Down to 0 in a straight line.
    Linear,
    /// Down to 0 along half a cosine.
    #[default]
    Cosine,
    /// No change (transformers' `constant_with_warmup`).
    Constant,
}

/// The learning rate of a run as a factor of its peak, step by step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub kind: SchedulerType,
    /// Steps in which the factor rises from 0 to 1 in a straight line.
    pub warmup_steps: usize,
    /// Steps of the whole run, warm-up included.
    pub total_steps: usize,
}

impl Schedule {
    /// The factor of the learning rate at a step counted from 0: that of transformers' `get_linear_schedule_with_warmup`,
    /// `get_cosine_schedule_with_warmup` (half a cycle) and `get_constant_schedule_with_warmup`. With a warm-up the first
    /// step's factor is 0, as there.
    pub fn factor(&self, step: usize) -> f64 {
        let Schedule { kind, warmup_steps, total_steps } = *self;
        if step < warmup_steps {
            return step as f64 / warmup_steps as f64;
        }
        let length = total_steps.saturating_sub(warmup_steps).max(1) as f64;
        match kind {
            SchedulerType::Linear => total_steps.saturating_sub(step) as f64 / length,
            SchedulerType::Cosine => {
                let progress = (step - warmup_steps) as f64 / length;
                (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
            }
            SchedulerType::Constant => 1.0,
        }
    }
}

/// Steps of a run: `max_steps` when given, otherwise `epochs` times the steps of an epoch, rounded up. At least one.
pub fn total_steps(steps_per_epoch: usize, epochs: f64, max_steps: Option<usize>) -> usize {
    max_steps.unwrap_or_else(|| (epochs * steps_per_epoch as f64).ceil() as usize).max(1)
}

/// Steps of the warm-up: `warmup_steps` when given, otherwise the part `warmup_ratio` of all steps, rounded up, but for the last. (transformers
/// rounds up whatever remains: a run of one step trains nothing there, since its rate is 0.)
pub fn warmup_steps(total_steps: usize, warmup_steps: Option<usize>, warmup_ratio: f64) -> usize {
    let part = || ((total_steps as f64 * warmup_ratio).ceil() as usize).min(total_steps.saturating_sub(1));
    warmup_steps.unwrap_or_else(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Factors of steps 0 to 10 by transformers 5.23: `scheduler.get_last_lr()` for a learning rate of 1.
    const EXPECTED: [(SchedulerType, usize, usize, &[f64]); 8] = [
        (
            SchedulerType::Linear,
            3,
            10,
            &[
                0.0,
                0.3333333333333333,
                0.6666666666666666,
                1.0,
                0.8571428571428571,
                0.7142857142857143,
                0.5714285714285714,
                0.42857142857142855,
                0.2857142857142857,
                0.14285714285714285,
                0.0,
            ],
        ),
        (
            SchedulerType::Cosine,
            3,
            10,
            &[
                0.0,
                0.3333333333333333,
                0.6666666666666666,
                1.0,
                0.9504844339512095,
                0.8117449009293668,
                0.6112604669781572,
                0.38873953302184283,
                0.18825509907063326,
                0.04951556604879048,
                0.0,
            ],
        ),
        (
            SchedulerType::Constant,
            3,
            10,
            &[0.0, 0.3333333333333333, 0.6666666666666666, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        ),
        (SchedulerType::Linear, 0, 10, &[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),
        (
            SchedulerType::Cosine,
            0,
            10,
            &[
                1.0,
                0.9755282581475768,
                0.9045084971874737,
                0.7938926261462366,
                0.6545084971874737,
                0.5,
                0.34549150281252633,
                0.2061073738537635,
                0.09549150281252633,
                0.024471741852423234,
                0.0,
            ],
        ),
        (SchedulerType::Constant, 0, 10, &[1.0; 11]),
        (
            SchedulerType::Linear,
            5,
            8,
            &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.6666666666666666, 0.3333333333333333, 0.0, 0.0, 0.0],
        ),
        (
            SchedulerType::Cosine,
            5,
            8,
            &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.2500000000000001, 0.0, 0.24999999999999978, 0.75],
        ),
    ];

    #[test]
    fn factors_are_those_of_transformers() {
        for (kind, warmup_steps, total_steps, factors) in EXPECTED {
            let schedule = Schedule { kind, warmup_steps, total_steps };
            for (step, &expected) in factors.iter().enumerate() {
                let factor = schedule.factor(step);
                assert!((factor - expected).abs() < 1e-15, "{schedule:?}, step {step}: {factor}, expected {expected}");
            }
        }
    }

    #[test]
    fn a_warm_up_longer_than_the_run_just_rises() {
        for kind in [SchedulerType::Linear, SchedulerType::Cosine, SchedulerType::Constant] {
            let schedule = Schedule { kind, warmup_steps: 10, total_steps: 4 };
            assert_eq!([0, 1, 3].map(|step| schedule.factor(step)), [0.0, 0.1, 0.3]);
            assert!(schedule.factor(usize::MAX).is_finite());
        }
    }

    #[test]
    fn steps_are_counted_as_transformers_counts_them() {
        assert_eq!(total_steps(125, 1.0, None), 125);
        assert_eq!(total_steps(125, 0.5, None), 63);
        assert_eq!(total_steps(125, 3.0, Some(7)), 7);
        assert_eq!(total_steps(0, 1.0, None), 1);
        assert_eq!(warmup_steps(125, None, 0.03), 4);
        assert_eq!(warmup_steps(125, Some(5), 0.03), 5);
        assert_eq!(warmup_steps(125, Some(0), 0.03), 0);
        assert_eq!(warmup_steps(125, None, 0.0), 0);
        // Here more is left than there.
        assert_eq!((warmup_steps(1, None, 0.03), warmup_steps(4, None, 1.0)), (0, 3));
    }
}
