//! `retune chat`: messages, and adapters that change between them.

mod common;

use std::io::Write;
use std::process::Stdio;

use common::{Folder, MODEL, Output, golden, joined};

/// A conversation: what is typed, and what the program says.
fn chat(folder: &Folder, args: &[&str], lines: &[&str]) -> Output {
    let model = golden(MODEL);
    let common = ["chat", "--model", &model, "--max-new-tokens", "12"];
    let mut command = folder.command(&joined(&[&common, args]));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all((lines.join("\n") + "\n").as_bytes()).unwrap();
    Output::of(child.wait_with_output().unwrap())
}

/// Adapters of three kinds for `MODEL`, trained for a few steps.
fn folder() -> Folder {
    let folder = Folder::with_run();
    let short = ["--set", "training.max_steps=6", "--set", "training.save_steps=6", "--set", "training.eval_steps=6"];
    for (name, more) in [
        ("a", vec!["--set", "training.learning_rate=0.05"]),
        ("b", vec!["--set", "method=miss", "--set", "adapter={r: 8}", "--set", "training.learning_rate=0.05"]),
        ("soft", vec!["--set", "method=prompt_tuning", "--set", "adapter={num_virtual_tokens: 5}"]),
    ] {
        let output = format!("output_dir={name}");
        folder.succeeds(&joined(&[&["train", "run.yaml", "--set", &output], &short, &more]));
    }
    folder
}

/// What `retune generate` answers to a first message.
fn answer(folder: &Folder, message: &str, more: &[&str]) -> String {
    let model = golden(MODEL);
    let args = ["generate", "--model", &model, "--max-new-tokens", "12", message];
    folder.succeeds(&joined(&[&args, more])).stdout.trim_end_matches('\n').to_owned()
}

const ALL: [&str; 6] = ["--adapter", "a=a/adapter", "--adapter", "b=b/adapter", "--adapter", "soft=soft/adapter"];

#[test]
fn adapters_answer_in_turn_and_what_was_said_stays() {
    let folder = folder();
    let first = |more: &[&str]| answer(&folder, "the sand", more);
    let (a, b, base) = (first(&["--adapter", "a/adapter"]), first(&["--adapter", "b/adapter"]), first(&[]));
    let soft = first(&["--adapter", "soft/adapter"]);
    assert!(a != base && b != base && a != b, "{a}, {b}, {base}");
    // Each begins anew, so that each answers as it does to a first message.
    let lines = ["the sand", "/new", "/adapter b", "the sand", "/new", "/adapter none", "the sand", "/new"];
    let lines =
        joined(&[&lines, &["/adapter soft", "the sand", "/new", "/adapter a", "the sand", "/quit", "never read"]]);
    let output = chat(&folder, &ALL, &lines);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    assert_eq!(output.stdout, format!("{a}\n{b}\n{base}\n{soft}\n{a}\n"));
    // What was said before, by whichever adapter, is part of what the next one reads.
    let told = chat(&folder, &ALL, &["the sand", "/adapter b", "of time", "/adapter a", "of time"]);
    let untold = chat(&folder, &ALL, &["/adapter b", "of time"]);
    assert_eq!(told.code, Some(0), "{}", told.stderr);
    assert_ne!(told.stdout.lines().nth(1), untold.stdout.lines().next());
    // Going back to an adapter that has read a part is the same as reading all of it.
    let again = chat(&folder, &ALL, &["/adapter a", "the sand", "/adapter b", "of time", "/adapter a", "of time"]);
    assert_eq!(again.stdout, told.stdout);
}

#[test]
fn adapters_are_weighed_and_listed() {
    let folder = folder();
    folder.succeeds(&["convert", "b/adapter", "--model", &golden(MODEL), "--to", "lora", "--out", "plain"]);
    folder.succeeds(&["combine", "--adapter", "a/adapter=0.5", "--adapter", "plain=-0.75", "--out", "both"]);
    let both = answer(&folder, "the sand", &["--adapter", "both"]);
    let output = chat(&folder, &ALL, &["/adapter a=0.5 b=-0.75", "the sand", "/adapter"]);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines[0], both);
    let listed =
        ["  none  (the base alone)", "  a  (lora)", "  b  (miss)", "  soft  (prompt_tuning)", "* a=0.5 b=-0.75"];
    assert_eq!(lines[1..], listed);
    // A whole weight is the adapter itself.
    let output = chat(&folder, &ALL, &["/adapter b=1", "the sand", "/new", "/adapter b", "the sand", "/adapter"]);
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines[0], lines[1]);
    assert_eq!(lines[4], "* b  (miss)");
}

#[test]
fn a_wrong_command_is_said_and_changes_nothing() {
    let folder = folder();
    let a = answer(&folder, "the sand", &["--adapter", "a/adapter"]);
    for (command, words) in [
        ("/adapter c", vec!["no adapter c", "none, a, b, soft"]),
        ("/adapter a=0.5 soft=0.5", vec!["soft (prompt_tuning) cannot be weighed", "changes no weight"]),
        ("/adapter a=much", vec!["no number", "a=0.5 b=0.5"]),
        ("/adapter a=0.5 b", vec!["names with weights"]),
        ("/adapter a=0.5 a=0.1", vec!["twice"]),
        ("/adapter none=1", vec!["base alone"]),
        ("/adopt b", vec!["/adopt is no command", "/adapter"]),
    ] {
        let output = chat(&folder, &ALL, &[command, "the sand"]);
        assert_eq!(output.code, Some(0), "{}", output.stderr);
        assert_eq!(output.stdout, format!("{a}\n"), "{command}");
        words.iter().for_each(|word| assert!(output.stderr.contains(word), "{command}: {}", output.stderr));
    }
    // More than the model can read is refused, and not kept.
    let long = "sand ".repeat(400);
    let output = chat(&folder, &ALL, &[&long, "the sand"]);
    assert_eq!(output.stdout, format!("{a}\n"), "{}", output.stderr);
    assert!(output.stderr.contains("the model's context is"), "{}", output.stderr);
}

#[test]
fn what_cannot_be_talked_with_is_refused() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let adapter = golden("lora_all_linear/adapter");
    let (one, other) = (format!("a={adapter}"), format!("b={adapter}"));
    folder
        .refuses(&["chat", "--model", &model, "--adapter", &one, "--adapter", &one], &["two adapters have the name a"]);
    folder.refuses(&["chat", "--model", &model, "--adapter", &other], &["does not fit"]);
    folder.refuses(&["chat", "--model", &golden("llama_tied")], &["tokenizer"]);
    for bad in [adapter.as_str(), "none=x", "=x", "a b=x"] {
        let output = folder.retune(&["chat", "--model", &model, "--adapter", bad]);
        assert_eq!(output.code, Some(2), "{bad}: {}", output.stderr);
    }
}

#[test]
fn adapters_answer_side_by_side_as_each_alone() {
    let folder = folder();
    let alone = |more: &[&str]| answer(&folder, "the sand", more);
    let expected =
        [alone(&["-a", "b/adapter"]), alone(&[]), alone(&["-a", "soft/adapter"]), alone(&["-a", "a/adapter"])];
    let named = ["-a", "b=b/adapter", "-a", "none", "-a", "soft=soft/adapter", "-a", "a/adapter"];
    let names = ["b", "none", "soft", "a/adapter"];
    let lines: Vec<String> =
        names.iter().zip(&expected).map(|(name, answer)| format!("[{name}] {}", answer.trim())).collect();
    assert_eq!(answer(&folder, "the sand", &named), lines.join("\n"));
    let found: serde_json::Value =
        serde_json::from_str(&answer(&folder, "the sand", &joined(&[&named, &["--json"]]))).unwrap();
    for (i, text) in expected.iter().enumerate() {
        assert_eq!(found["answers"][i]["adapter"], names[i]);
        assert_eq!(found["answers"][i]["text"], **text);
    }
    // What is trained in the place of tables and norms has no place beside others.
    let whole = ["--set", "output_dir=norms", "--set", "method=partial", "--set", "adapter={norms: true}"];
    folder.succeeds(&joined(&[&["train", "run.yaml", "--set", "training.max_steps=2"], &whole]));
    let model = golden(MODEL);
    let args = ["generate", "-m", &model, "-a", "a/adapter", "-a", "n=norms/adapter", "the sand"];
    folder.refuses(&args, &["the adapter n (", "give it alone"]);
    let args = ["generate", "-m", &model, "-a", "x=a/adapter", "-a", "x=b/adapter", "the sand"];
    folder.refuses(&args, &["two adapters have the name x"]);
}
