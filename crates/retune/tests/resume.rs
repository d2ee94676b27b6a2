//! A run that is killed, interrupted or out of room goes on and ends with the bytes of a run that was left alone.

#![cfg(unix)]

mod common;

use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{Folder, METHODS, Output, Random, STEPS, Tree, joined, refused, run};
use serde_json::{Value, json};

const KILLS: usize = 20;

/// Optimizers that keep something else than the usual one.
const OPTIMIZERS: [&[&str]; 2] = [
    &["--set", "training.optim=adamw_8bit", "--set", "adapter={r: 256, target_modules: all-linear}"],
    &["--set", "training.optim=adafactor"],
];

/// The adapter of a run that was left alone, and how long the run took.
static UNDISTURBED: LazyLock<(Tree, Duration)> = LazyLock::new(|| undisturbed(1));

fn undisturbed(threads: usize) -> (Tree, Duration) {
    let folder = Folder::with_run();
    let start = Instant::now();
    let output = run(folder.command_on(threads, &["train", "run.yaml"]));
    let took = start.elapsed();
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    check_metrics(&folder);
    (folder.adapter(), took)
}

/// Asserts that a run has ended as one that was left alone does.
fn check_finished(folder: &Folder) {
    let (found, expected) = (folder.adapter(), &UNDISTURBED.0);
    let names: Vec<_> = found.keys().map(|path| path.to_str().unwrap()).collect();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors", "retune.json"]);
    for (path, bytes) in &found {
        assert!(expected.get(path) == Some(bytes), "{} differs", path.display());
    }
    check_metrics(folder);
    let tree = folder.tree("out");
    let temporary = tree.keys().find(|path| path.file_name().unwrap().to_string_lossy().starts_with('.'));
    assert_eq!(temporary, None);
}

/// Asserts that every step and every evaluation is in the metrics once.
fn check_metrics(folder: &Folder) {
    let metrics = String::from_utf8(folder.read("out/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps_with = |key: &str| -> Vec<u64> {
        lines.iter().filter(|line| !line[key].is_null()).map(|line| line["step"].as_u64().unwrap()).collect()
    };
    assert_eq!(steps_with("loss"), (1..=STEPS).collect::<Vec<_>>());
    assert_eq!(steps_with("eval_loss"), [0, 10, 20, 30]);
}

fn spawn(mut command: Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Starts a run and sends it Ctrl-C once it has done a step.
fn interrupted(folder: &Folder, args: &[&str]) -> Output {
    let mut child = spawn(folder.command(&joined(&[&["train", "run.yaml"], args])));
    let metrics = folder.path("out/metrics.jsonl");
    while std::fs::metadata(&metrics).map_or(0, |file| file.len()) == 0 {
        if child.try_wait().unwrap().is_some() {
            panic!("ended before it could be interrupted: {}", Output::of(child.wait_with_output().unwrap()).stderr);
        }
        sleep(Duration::from_millis(1));
    }
    // SAFETY: kill has no conditions on memory, and the child has not been waited for, so the id is still its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
    Output::of(child.wait_with_output().unwrap())
}

#[test]
fn two_runs_on_any_number_of_threads_give_the_same_bytes() {
    assert!(undisturbed(1).0 == UNDISTURBED.0, "a second run differs");
    assert!(undisturbed(2).0 == UNDISTURBED.0, "a run on two threads differs");
}

#[test]
fn a_run_killed_twenty_times_gives_the_same_bytes() {
    let took = UNDISTURBED.1;
    let mut random = Random(7);
    let mut folder = Folder::with_run();
    let mut kills = 0;
    while kills < KILLS {
        let mut child = spawn(folder.command(&["train", "run.yaml", "--resume"]));
        // The time decides only where the kill lands: from before the first file is written to far into the run.
        sleep(took.mul_f64(random.below(1000) as f64 / 4000.0));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            continue;
        }
        let output = Output::of(child.wait_with_output().unwrap());
        assert_eq!(output.code, Some(0), "{}", output.stderr);
        check_finished(&folder);
        folder = Folder::with_run();
    }
    folder.succeeds(&["train", "run.yaml", "--resume"]);
    check_finished(&folder);
}

#[test]
fn an_interrupted_run_says_how_to_go_on_and_gives_the_same_bytes() {
    let folder = Folder::with_run();
    let output = interrupted(&folder, &[]);
    assert_eq!(output.code, Some(130), "{}", output.stderr);
    assert!(output.stderr.contains(&format!("of {STEPS}; everything is saved")), "{}", output.stderr);
    assert!(output.stderr.contains("retune train run.yaml --resume"), "{}", output.stderr);
    assert!(!folder.path("out/adapter").exists());

    let output = folder.succeeds(&["train", "run.yaml", "--resume"]);
    assert!(output.stderr.contains("going on after step"), "{}", output.stderr);
    check_finished(&folder);
}

#[test]
fn the_advice_after_an_interrupt_repeats_the_overrides() {
    let folder = Folder::with_run();
    let output = interrupted(&folder, &["--set", "training.learning_rate=0.005"]);
    assert_eq!(output.code, Some(130), "{}", output.stderr);
    assert!(output.stderr.contains("--set training.learning_rate=0.005"), "{}", output.stderr);
}

#[test]
fn a_finished_run_resumed_gives_the_same_bytes() {
    let folder = Folder::with_run();
    folder.succeeds(&["train", "run.yaml"]);
    let card = folder.read("out/adapter/README.md");
    folder.succeeds(&["train", "run.yaml", "--resume"]);
    check_finished(&folder);
    assert!(folder.read("out/adapter/README.md") == card, "the card says how long it took to train");
    std::fs::remove_file(folder.path("out/adapter/README.md")).unwrap();
    folder.succeeds(&["train", "run.yaml", "--resume"]);
    let card = String::from_utf8(folder.read("out/adapter/README.md")).unwrap();
    assert!(card.contains("| steps |") && !card.contains("| seconds |"), "{card}");
}

#[test]
fn a_run_that_stops_early_says_why_and_a_kill_changes_none_of_its_bytes() {
    // No score is that much better than the first one, which comes after step 10.
    let stops = ["--set", "training.early_stopping_patience=1", "--set", "training.early_stopping_threshold=50"];
    let args = joined(&[&["train", "run.yaml"], &stops]);
    let alone = Folder::with_run();
    let output = alone.succeeds(&args);
    let why = "stopped early at step 20 of 30 because the last held-out score was not lower than the best before it by more than 50";
    assert!(output.stdout.contains(why), "{}", output.stdout);
    let record: Value = serde_json::from_slice(&alone.read("out/adapter/retune.json")).unwrap();
    assert_eq!((&record["steps"], &record["planned_steps"]), (&json!(20), &json!(30)));
    assert!(alone.path("out/checkpoints/step-00000020.safetensors").exists(), "where it ended is not saved");
    let card = String::from_utf8(alone.read("out/adapter/README.md")).unwrap();
    assert!(card.contains("| steps | 20 of 2 rows, 30 were planned |"), "{card}");

    let folder = Folder::with_run();
    assert_eq!(interrupted(&folder, &stops).code, Some(130));
    folder.succeeds(&joined(&[&args, &["--resume"]]));
    assert!(folder.adapter() == alone.adapter(), "it differs");
    // From the checkpoint before the last, and from the last, after which nothing is left to train.
    std::fs::remove_file(folder.path("out/checkpoints/step-00000020.safetensors")).unwrap();
    for from in [18, 20] {
        let output = folder.succeeds(&joined(&[&args, &["--resume", "--json"]]));
        assert!(output.stderr.contains(&format!("going on after step {from}")), "{}", output.stderr);
        let found = output.json();
        assert_eq!((&found["steps"], &found["planned_steps"]), (&json!(20), &json!(30)));
        assert!(found["stopped_early"].as_str().is_some_and(|text| text.starts_with(why)), "{found}");
        assert!(folder.adapter() == alone.adapter(), "from step {from} it differs");
    }

    // With patience for one more it ends where it was to end, which is not early.
    let more = joined(&[&args, &["--set", "training.early_stopping_patience=2", "--overwrite", "--json"]]);
    let found = alone.succeeds(&more).json();
    assert_eq!((&found["steps"], &found["stopped_early"]), (&json!(30), &Value::Null));
    // Of rows that are all the same none can be held out.
    folder.write("same.jsonl", common::rows(0..1).repeat(3));
    let same = joined(&[&args, &["--overwrite", "--set", "data={train: same.jsonl, eval_fraction: 0.5}"]]);
    folder.refuses(&same, &["training.early_stopping_patience is 1", "no row is held out", "data.eval_fraction"]);
}

#[test]
fn events_for_tensorboard_hold_every_step_once_after_a_kill() {
    let reports = ["--set", "training.report_to=tensorboard", "--set", "training.save_steps=4"];
    let folder = Folder::with_run();
    assert_eq!(interrupted(&folder, &reports).code, Some(130));
    let resume = joined(&[&["train", "run.yaml", "--resume"], &reports]);
    folder.succeeds(&resume);
    // As after a kill at step 30 whose last checkpoint is that of step 28.
    std::fs::remove_file(folder.path("out/checkpoints/step-00000030.safetensors")).unwrap();
    folder.succeeds(&resume);
    assert!(folder.adapter() == undisturbed_with(&reports), "the adapter differs");
    let steps = |tag: &str| -> Vec<u64> {
        let files = folder.tree("out/tensorboard");
        let found = files.values().flatten().flat_map(|content| events_of(content, tag));
        found.collect()
    };
    assert_eq!(steps("eval/loss"), [0, 10, 20, 30]);
    for tag in ["train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "train/num_input_tokens_seen"] {
        assert_eq!(steps(tag), (1..=STEPS).collect::<Vec<_>>(), "{tag}");
    }
    // A finished run that is asked for again writes nothing, and one that starts anew nothing of the earlier one.
    let before = folder.tree("out/tensorboard");
    folder.succeeds(&resume);
    assert!(folder.tree("out/tensorboard") == before);
    folder.succeeds(&["train", "run.yaml", "--overwrite"]);
    assert!(!folder.path("out/tensorboard").exists());
}

/// The adapter of a run with these flags that was left alone.
fn undisturbed_with(flags: &[&str]) -> Tree {
    let folder = Folder::with_run();
    folder.succeeds(&joined(&[&["train", "run.yaml"], flags]));
    folder.adapter()
}

/// The steps of the events of a file that have a tag: records of a length in 8 bytes, 4 of a checksum, the event and 4 more.
fn events_of(content: &[u8], tag: &str) -> Vec<u64> {
    let (mut rest, mut found) = (content, Vec::new());
    while let Some((head, after)) = rest.split_at_checked(12) {
        let length = u64::from_le_bytes(head[..8].try_into().unwrap()) as usize;
        let event = &after[..length];
        // A time in nine bytes, then the step, which is small here.
        if event.windows(tag.len()).any(|bytes| bytes == tag.as_bytes()) {
            assert!(event[9] == 0x10 && event[10] < 0x80, "{event:?}");
            found.push(u64::from(event[10]));
        }
        rest = &after[length + 4..];
    }
    found
}

#[test]
fn resuming_where_there_is_no_run_says_so() {
    let folder = Folder::with_run();
    let args = ["train", "run.yaml", "--resume", "--set", "training.max_steps=1"];
    let words = "out holds no run to go on with: this is a new one";
    assert!(folder.succeeds(&args).stderr.contains(words));
    assert!(!folder.succeeds(&args).stderr.contains(words));
}

#[test]
fn a_learning_rate_of_seventeen_digits_is_the_same_after_it_was_written() {
    let folder = Folder::with_run();
    let args =
        ["train", "run.yaml", "--set", "training.learning_rate=0.0009452706955539223", "--set", "training.max_steps=1"];
    folder.succeeds(&args);
    folder.succeeds(&joined(&[&args, &["--resume"]]));
}

#[test]
fn a_run_is_not_resumed_with_another_configuration_or_other_data() {
    let folder = Folder::with_run();
    let args = ["train", "run.yaml", "--set", "training.max_steps=2"];
    folder.succeeds(&args);
    folder.refuses(&args, &["out holds a run already", "--resume", "--overwrite", "output_dir"]);
    let resume = joined(&[&args, &["--resume"]]);
    for (change, words) in [
        ("training.learning_rate=0.5", "training.learning_rate was 0.01, now it is 0.5"),
        ("adapter.r=8", "adapter.r was 4, now it is 8"),
        ("training.max_steps=3", "training.max_steps was 2, now it is 3"),
        ("data.max_length=100", "data.max_length was 192, now it is 100"),
    ] {
        folder.refuses(&joined(&[&resume, &["--set", change]]), &["another configuration", words, "--overwrite"]);
    }
    let rows = folder.read("train.jsonl");
    folder.write("train.jsonl", [&rows[..], b"{\"prompt\": \"a\", \"completion\": \"b\"}\n"].concat());
    let words = ["train.jsonl has other rows to train on", "1 are new and 0 are gone (30 then, 31 now)", "--overwrite"];
    folder.refuses(&resume, &words);
    let mut lines: Vec<&[u8]> = rows.split_inclusive(|byte| *byte == b'\n').collect();
    lines.swap(0, 3);
    folder.write("train.jsonl", lines.concat());
    folder.refuses(&resume, &["train.jsonl has other rows to train on", "the same 30, in another order"]);
    folder.write("train.jsonl", &rows);
    let held_out = folder.read("eval.jsonl");
    folder.write("eval.jsonl", lines[0]);
    folder.refuses(&resume, &["eval.jsonl has other held-out rows", "are gone (4 then, 1 now)"]);
    folder.write("eval.jsonl", held_out);
    // A run of an earlier version has no record of its rows.
    std::fs::remove_file(folder.path("out/row_hashes.json")).unwrap();
    folder.write("train.jsonl", lines.concat());
    folder.refuses(&resume, &["train.jsonl has other rows to train on than when the run in out began. Restore"]);
    folder.write("train.jsonl", &rows);
    folder.succeeds(&resume);
    folder.succeeds(&joined(&[&args, &["--overwrite", "--set", "training.learning_rate=0.5"]]));
}

#[test]
fn a_folder_that_another_run_trains_in_is_left_alone() {
    let folder = Folder::with_run();
    std::fs::create_dir(folder.path("out")).unwrap();
    let other = std::fs::File::open(folder.path("out")).unwrap();
    other.lock().unwrap();
    folder.refuses(&["train", "run.yaml"], &["another retune is at work in out", "output_dir"]);
    assert!(folder.tree("out").is_empty());
    drop(other);
    folder.succeeds(&["train", "run.yaml", "--set", "training.max_steps=1"]);
    let other = std::fs::File::open(folder.path("out")).unwrap();
    other.lock().unwrap();
    let before = folder.tree("out");
    for more in ["--overwrite", "--resume"] {
        folder.refuses(&["train", "run.yaml", "--set", "training.max_steps=1", more], &["another retune is at work"]);
    }
    assert!(folder.tree("out") == before);
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_serves() {
    let folder = Folder::with_run();
    folder.succeeds(&["train", "run.yaml"]);
    let newest = "out/checkpoints/step-00000030.safetensors";
    let whole = folder.read(newest);
    for length in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        folder.write(newest, &whole[..length]);
        folder.refuses(&["train", "run.yaml", "--resume"], &[newest, "damaged", "delete it"]);
    }
    std::fs::remove_file(folder.path(newest)).unwrap();
    let output = folder.succeeds(&["train", "run.yaml", "--resume"]);
    assert!(output.stderr.contains("going on after step 27"), "{}", output.stderr);
    check_finished(&folder);
    folder.write("out/run.json", "{");
    folder.refuses(&["train", "run.yaml", "--resume"], &["out/run.json", "damaged", "--overwrite"]);
}

/// Runs the program where no file can grow beyond ten kilobytes or so, as on a disk that is full.
fn in_little_room(folder: &Folder, args: &[&str]) -> Output {
    let program = folder.command(args);
    let mut shell = Command::new("/bin/sh");
    // Ignored, the signal becomes an error of the write, as a full disk gives it.
    shell.args(["-c", "trap '' XFSZ; ulimit -f 20; exec \"$0\" \"$@\""]);
    shell.arg(program.get_program()).args(program.get_args()).current_dir(folder.path(""));
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    run(shell)
}

#[test]
fn a_full_disk_leaves_the_checkpoints_and_the_run_goes_on_when_there_is_room() {
    let folder = Folder::with_run();
    let output = in_little_room(&folder, &["train", "run.yaml"]);
    refused(
        "the first checkpoint",
        &output,
        &["cannot write out/checkpoints/step-00000003.safetensors", "File too large"],
    );
    assert!(folder.tree("out/checkpoints").is_empty());
    folder.succeeds(&["train", "run.yaml", "--resume"]);
    check_finished(&folder);

    // Once more from the checkpoint before the last.
    std::fs::remove_file(folder.path("out/checkpoints/step-00000030.safetensors")).unwrap();
    std::fs::remove_dir_all(folder.path("out/adapter")).unwrap();
    let before = folder.tree("out/checkpoints");
    let output = in_little_room(&folder, &["train", "run.yaml", "--resume"]);
    refused("the last checkpoint", &output, &["going on after step 27", "cannot write out/checkpoints/"]);
    assert!(folder.tree("out/checkpoints") == before, "the checkpoints have changed");
    assert!(!folder.path("out/adapter").exists());
    folder.succeeds(&["train", "run.yaml", "--resume"]);
    check_finished(&folder);
}

#[test]
fn a_full_disk_leaves_the_adapter_that_was_there() {
    let folder = Folder::with_run();
    folder.succeeds(&["train", "run.yaml"]);
    let before = folder.tree("out");
    let output = in_little_room(&folder, &["train", "run.yaml", "--resume"]);
    refused("the adapter", &output, &["cannot write out/adapter/adapter_model.safetensors"]);
    assert!(folder.tree("out") == before, "what was written before has changed");
}

#[test]
fn a_full_disk_leaves_the_model_that_was_there() {
    let folder = Folder::with_run();
    let mut run: Value = serde_json::from_slice(&folder.read("run.yaml")).unwrap();
    run["method"] = json!("full");
    run["adapter"] = Value::Null;
    folder.write("run.yaml", format!("{run:#}"));
    let args = ["train", "run.yaml", "--set", "training.max_steps=2"];
    folder.succeeds(&args);
    let before = folder.tree("out/model");
    let output = in_little_room(&folder, &joined(&[&args, &["--resume"]]));
    refused("the model", &output, &["cannot write"]);
    assert!(folder.tree("out/model") == before, "the model that was there has changed");
}

#[test]
fn a_full_disk_leaves_no_part_of_a_merged_model_or_of_logits() {
    let folder = Folder::with_run();
    folder.succeeds(&["train", "run.yaml", "--set", "training.max_steps=2"]);
    let before = folder.tree("");
    let model = common::golden(common::MODEL);
    let merge = ["merge", "--model", &model, "--adapter", "out/adapter", "--out", "merged"];
    refused("merge", &in_little_room(&folder, &merge), &["cannot write .merged.tmp/", "File too large"]);
    let tokens = ["1"; 64].join(",");
    let logits = ["logits", "--model", &model, "--tokens", &tokens, "--out", "logits.safetensors"];
    refused("logits", &in_little_room(&folder, &logits), &["cannot write logits.safetensors", "File too large"]);
    assert!(folder.tree("") == before, "something was left behind");
}

#[test]
fn with_every_method_an_interrupted_run_ends_with_the_bytes_of_one_left_alone() {
    for method in METHODS.into_iter().chain(OPTIMIZERS) {
        let short = joined(&[&["--set", "training.max_steps=6", "--set", "training.save_steps=3"], method]);
        let alone = Folder::with_run();
        alone.succeeds(&joined(&[&["train", "run.yaml"], &short]));
        let folder = Folder::with_run();
        let output = interrupted(&folder, &short);
        if output.code != Some(0) {
            folder.succeeds(&joined(&[&["train", "run.yaml", "--resume"], &short]));
        }
        assert!(folder.adapter() == alone.adapter(), "{method:?}");
        // What was written is read and used.
        let model = common::golden(common::MODEL);
        let adapter = ["--model", &model, "--adapter", "out/adapter"];
        let answer = alone.succeeds(&joined(&[&["generate"], &adapter, &["--max-new-tokens", "4", "the sand"]]));
        assert!(!answer.stdout.is_empty());
        let found = alone.succeeds(&["inspect", "out/adapter", "--json"]).json();
        assert!(found["parameters"].as_u64().is_some_and(|n| n > 0));
        let first = &alone.succeeds(&joined(&[&["eval", "--data", "eval.jsonl", "--json"], &adapter])).json()["loss"];
        let base = &alone.succeeds(&["eval", "--data", "eval.jsonl", "--json", "--model", &model]).json()["loss"];
        assert!(first.as_f64().is_some_and(f64::is_finite) && first != base, "{method:?} changes nothing");
    }
}
