//! `retune schema`: the JSON Schema of run files.

/// Prints it.
pub fn run() {
    println!("{}", retune_train::run_config::json_schema());
}
