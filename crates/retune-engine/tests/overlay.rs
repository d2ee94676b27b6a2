//! What stands on a model: one place with two users, and the gradient of everything that can be trained.

mod common;

use common::{Case, HIDDEN, VOCAB, everything, llama, pass, relative};
use retune_engine::Saving;

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

/// For what stands together in no family too.
#[test]
fn the_gradient_of_every_tensor_is_that_of_the_loss() {
    let pass = pass(&[9, 14, 2]);
    for mut case in [
        Case::whole(&llama(true), false),
        Case::whole(&everything(false), false),
        Case::whole(&everything(true), false),
        Case::adapted(&everything(true), 3),
    ] {
        case.check_gradient(&pass);
    }
}
