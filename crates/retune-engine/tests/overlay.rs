//! What stands on a model: one place with two users, and the gradient of everything that can be trained.

mod common;

use common::{Case, HIDDEN, VOCAB, everything, llama, pass, relative};
use retune_engine::Saving;
use retune_kernels::random;

#[test]
fn a_tied_table_is_one_place_with_two_users() {
    for spec in [llama(true), everything(true)] {
        let tied = Case::whole(&spec, false);
        let apart = Case::whole(&spec, true);
        let head = |case: &Case| case.overlay.linears.last().unwrap().weight.clone().unwrap();
        let table = tied.overlay.table.clone().unwrap();
        assert_eq!(head(&tied), table);
        assert_eq!(apart.overlay.table, Some(table.clone()));
        assert_eq!(head(&apart), tied.params.len()..tied.params.len() + VOCAB * HIDDEN);

        let pass = pass(&[11, 1, 6]);
        assert_eq!(tied.loss(&pass), apart.loss(&pass));
        let (ours, theirs) = (tied.gradient(&pass, Saving::Full), apart.gradient(&pass, Saving::Full));
        let sum: Vec<f32> =
            theirs[table.clone()].iter().zip(&theirs[head(&apart)]).map(|(table, head)| table + head).collect();
        let users = [&theirs[table.clone()], &theirs[head(&apart)]];
        assert!(users.iter().all(|user| relative(user, &sum) > 0.1), "one user alone makes the gradient");
        let error = relative(&ours[table.clone()], &sum);
        assert!(error < 1e-6, "{error}");
        // The rest does not know the difference.
        assert!(relative(&ours[table.end..], &theirs[table.end..tied.params.len()]) < 1e-6);
    }
}

#[test]
fn what_replaces_a_tensor_by_itself_changes_nothing() {
    for spec in [llama(false), everything(true)] {
        let pass = pass(&[11, 1, 6]);
        let (bare, whole) = (Case::bare(&spec).logits(&pass), Case::whole(&spec, false).logits(&pass));
        assert_eq!(bare, whole);
    }
}

/// Against central differences along a random direction in each tensor: for what stands together in no family too.
#[test]
fn the_gradient_of_every_tensor_is_that_of_the_loss() {
    let pass = pass(&[9, 14, 2]);
    for mut case in [
        Case::whole(&llama(true), false),
        Case::whole(&everything(false), false),
        Case::whole(&everything(true), false),
        Case::adapted(&everything(true), 3),
    ] {
        let grads = case.gradient(&pass, Saving::Full);
        for param in case.overlay.layout.params().to_vec() {
            let gradient = &grads[param.range.clone()];
            let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 0.0, "{} has no gradient", param.name);
            // The gradient's own direction, a little turned: its loss moves well above the rounding of f32.
            let key = random::hash(&param.name);
            let wobble = |i: usize| f64::from(random::symmetric(random::at(key, i as u64)));
            let size = norm / (gradient.len() as f64).sqrt();
            let direction: Vec<f64> =
                gradient.iter().enumerate().map(|(i, &g)| f64::from(g) + size * wobble(i)).collect();
            let length = direction.iter().map(|d| d * d).sum::<f64>().sqrt();
            let slope: f64 = direction.iter().zip(gradient).map(|(d, &g)| d * f64::from(g)).sum::<f64>() / length;
            let step = 0.02 / slope.abs().max(2.0);
            let before = case.params[param.range.clone()].to_vec();
            let mut loss_at = |by: f64| {
                let values = case.params[param.range.clone()].iter_mut();
                values
                    .zip(&before)
                    .zip(&direction)
                    .for_each(|((p, b), d)| *p = (f64::from(*b) + by * d / length) as f32);
                case.loss(&pass)
            };
            let difference = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            loss_at(0.0);
            let error = (difference - slope).abs() / slope.abs();
            assert!(error < 0.01, "{}: the loss moves by {difference}, the gradient says {slope}", param.name);
        }
    }
}
