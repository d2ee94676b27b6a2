//! What other programs call the keys of a run file: peft, transformers, TRL, axolotl, LLaMA-Factory, unsloth, mlx-lm, torchtune.

/// A name elsewhere, in lower case, and what there is here.
const SYNONYMS: &[(&[&str], Here)] = &[
    (&["base_model", "model_id", "model_name", "model_name_or_path", "model_path"], Key("model")),
    (&["adapter_path", "out", "output", "output_path", "save_path"], Key("output_dir")),
    (&["adapter_type", "fine_tune_type", "finetuning_type", "peft_type"], Key("method")),
    (&["lora_dim", "lora_r", "lora_rank", "rank"], Key("adapter.r")),
    (&["alpha", "lora_alpha"], Key("adapter.lora_alpha")),
    (&["dropout", "lora_dropout"], Key("adapter.lora_dropout")),
    (&["lora_modules", "lora_target", "lora_target_modules", "target_modules"], Key("adapter.target_modules")),
    (&["num_tokens", "prompt_length"], Key("adapter.num_virtual_tokens")),
    (&["data_path", "dataset", "dataset_path", "datasets", "train_data", "train_file"], Key("data.train")),
    (&["eval_data", "eval_dataset", "eval_file", "val_data", "val_file", "validation_file"], Key("data.eval")),
    (&["eval_split", "test_size", "val_set_size", "val_size", "validation_split"], Key("data.eval_fraction")),
    (
        &[
            "context_length",
            "cutoff_len",
            "max_len",
            "max_seq_len",
            "max_seq_length",
            "model_max_length",
            "seq_len",
            "sequence_len",
        ],
        Key("data.max_length"),
    ),
    (&["train_on_inputs"], Key("data.train_on_prompt")),
    (&["epoch", "epochs", "n_epochs", "num_epochs", "num_train_epochs"], Key("training.epochs")),
    (&["iters", "max_train_steps", "num_steps", "steps"], Key("training.max_steps")),
    (
        &["batch", "batch_size", "micro_batch_size", "per_device_train_batch_size", "train_batch_size"],
        Key("training.batch_size"),
    ),
    (&["grad_accum", "grad_accumulation_steps", "gradient_accumulation"], Key("training.gradient_accumulation_steps")),
    (&["learning_rate", "lr", "max_lr", "peak_lr"], Key("training.learning_rate")),
    (&["lr_schedule", "lr_scheduler", "scheduler", "scheduler_type"], Key("training.lr_scheduler_type")),
    (&["num_warmup_steps", "warmup", "warmup_iters"], Key("training.warmup_steps")),
    (&["wd"], Key("training.weight_decay")),
    (&["clip_grad_norm", "gradient_clip_val", "gradient_clipping", "max_norm"], Key("training.max_grad_norm")),
    (&["eval_every", "evaluation_steps", "steps_per_eval"], Key("training.eval_steps")),
    (&["early_stopping", "early_stopping_steps", "patience"], Key("training.early_stopping_patience")),
    (&["early_stopping_min_delta", "min_delta"], Key("training.early_stopping_threshold")),
    (&["save_every"], Key("training.save_steps")),
    (&["grad_checkpoint", "gradient_checkpointing"], Key("training.activation_checkpointing")),
    (&["num_threads"], Key("threads")),
    (&["resume", "resume_from_checkpoint"], Words("a run goes on with the flag --resume")),
    (&["optimizer"], Key("training.optim")),
    (
        &["delimiter", "sep", "separator"],
        Words("columns of a .csv file are separated by what its header line has: commas, semicolons, tabs or bars"),
    ),
    (&["load_in_4bit", "load_in_8bit", "quantization", "quantization_bit"], Key("base.storage")),
    (&["bf16", "dtype", "fp16", "torch_dtype"], Words("base.compute says in what arithmetic the base is computed")),
];

/// What stands here for a name elsewhere.
#[derive(Clone, Copy)]
pub(super) enum Here {
    /// The path of a key.
    Key(&'static str),
    /// No key of its own.
    Words(&'static str),
}

use Here::{Key, Words};

/// What stands here for a key of another program.
pub(super) fn here(key: &str) -> Option<Here> {
    let key = key.to_lowercase();
    SYNONYMS.iter().find(|(names, _)| names.contains(&key.as_str())).map(|(_, here)| *here)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_once_and_stand_for_keys_that_exist() {
        let mut names: Vec<&str> = SYNONYMS.iter().flat_map(|(names, _)| *names).copied().collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count, "a name is there twice");
        let schema: serde_json::Value = serde_json::from_str(&super::super::json_schema()).unwrap();
        let known = super::super::tree::Schema::new(&schema).all_keys();
        for (_, here) in SYNONYMS {
            if let Key(key) = here {
                assert!(known.iter().any(|known| known == key), "there is no key {key}");
            }
        }
    }
}
