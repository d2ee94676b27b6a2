//! Files that people really have, and what becomes of them: the row that is learnt, or the words that say what is wrong.
//!
//! The first table is of files that were always read right, the second of those that others write or that are damaged.

use std::io::Write;
use std::path::Path;

use retune_train::data::*;
use retune_train::error::Error;

#[path = "../src/data/testing.rs"]
mod testing;

use testing::{tokenizer, tokenizer_with};

/// The turns of [`testing::CHATML`] with what they were answered, as [`shown`] shows them.
fn chatml(turns: &[(&str, &str)]) -> String {
    let turn = |(role, text): &(&str, &str)| match text.strip_prefix('«') {
        Some(answer) => format!("<|im_start|>{role}\n«{answer}<|im_end|>»\n"),
        None => format!("<|im_start|>{role}\n{text}<|im_end|>\n"),
    };
    turns.iter().map(turn).collect::<String>().trim_end().to_owned()
}

fn build(
    name: &str,
    bytes: &[u8],
    template: Option<&str>,
    options: &ReadOptions,
) -> Result<(Vec<String>, Dataset), Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    build_path(&path, template, options)
}

/// The rows as text, what is learnt between «», and the report.
fn build_path(path: &Path, template: Option<&str>, options: &ReadOptions) -> Result<(Vec<String>, Dataset), Error> {
    let tokenizer = template.map_or_else(tokenizer, |template| tokenizer_with(Some(template)));
    let encode = EncodeOptions {
        max_length: 2000,
        overlong: Overlong::Truncate,
        on_bad_row: options.on_bad_row,
        train_on_prompt: false,
        has_encoder: false,
        names: Names::KEYS,
    };
    let file = read_rows(&Files::from(path), options)?;
    let data = Dataset::build(&file, &Encoder::new(&tokenizer, encode)?, None)?;
    let shown = |example: &Example| {
        let pieces = decoded_sample(&tokenizer, example).into_iter();
        pieces.map(|(text, trained)| if trained { format!("«{text}»") } else { text }).collect()
    };
    Ok((data.examples.iter().map(shown).collect(), data))
}

fn rows(name: &str, bytes: &[u8]) -> Vec<String> {
    build(name, bytes, None, &ReadOptions::AUTO).unwrap_or_else(|error| panic!("{error}")).0
}

fn refused(name: &str, bytes: &[u8]) -> String {
    match build(name, bytes, None, &ReadOptions::AUTO) {
        Ok((rows, _)) => panic!("{name}: {rows:?}"),
        Err(error) => error.to_string(),
    }
}

/// The one row of a file of JSON lines.
fn row(line: &str) -> String {
    let mut rows = rows("rows.jsonl", line.as_bytes());
    assert_eq!(rows.len(), 1);
    rows.remove(0)
}

const MALI: &str = "Capital of Mali?";

#[test]
fn what_was_read_right_is_read_as_before() {
    let asked = chatml(&[("user", MALI), ("assistant", "«Bamako.")]);
    let with_input = chatml(&[("user", "Capital?\n\nMali"), ("assistant", "«Bamako.")]);
    let turns = r#"[{"role": "user", "content": "Capital of Mali?"}, {"role": "assistant", "content": "Bamako."}]"#;
    let long = chatml(&[
        ("system", "Be brief."),
        ("user", "A moon."),
        ("assistant", "«Io."),
        ("user", "More."),
        ("assistant", "«Titan."),
    ]);
    let cases: &[(&str, String, &str)] = &[
        ("a.jsonl", format!("{{\"messages\": {turns}}}"), &asked),
        ("a.jsonl", format!("{{\"id\": 3, \"source\": \"x\", \"messages\": {turns}}}"), &asked),
        ("a.json", format!("[{{\"messages\": {turns}}}]"), &asked),
        ("a.ndjson", format!("\u{FEFF}{{\"messages\": {turns}}}\r\n\r\n"), &asked),
        (
            "a.jsonl",
            r#"{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A moon."}, {"role": "assistant", "content": "Io."}, {"role": "user", "content": "More."}, {"role": "assistant", "content": "Titan."}]}"#.into(),
            &long,
        ),
        ("a.jsonl", r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}]}"#.into(), &chatml(&[("user", "u"), ("assistant", "«a")])),
        ("a.jsonl", r#"{"messages": [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "A tree."}, {"role": "assistant", "content": "Larch."}]}"#.into(), &chatml(&[("assistant", "«Hello."), ("user", "A tree."), ("assistant", "«Larch.")])),
        ("a.jsonl", r#"{"messages": [{"role": "user", "content": "é 🦀 \"x\"\n"}, {"role": "assistant", "content": " a\n"}]}"#.into(), &chatml(&[("user", "é 🦀 \"x\"\n"), ("assistant", "« a\n")])),
        ("a.jsonl", r#"{"messages": [{"role": "critic", "content": "c"}, {"role": "assistant", "content": "a"}]}"#.into(), &chatml(&[("critic", "c"), ("assistant", "«a")])),
        ("a.jsonl", r#"{"instruction": "Capital of Mali?", "input": "", "output": "Bamako."}"#.into(), &asked),
        ("a.jsonl", r#"{"instruction": "Capital of Mali?", "output": "Bamako."}"#.into(), &asked),
        ("a.jsonl", r#"{"instruction": "Capital of Mali?", "input": null, "output": "Bamako.", "text": "Capital … Bamako."}"#.into(), &asked),
        ("a.jsonl", r#"{"instruction": "Capital?", "input": "Mali", "output": "Bamako."}"#.into(), &with_input),
        ("a.csv", "instruction,input,output\nCapital?,Mali,Bamako.\n".into(), &with_input),
        ("a.csv", "output,instruction,input\n\"Bamako.\",\"Capital of Mali?\",\n".into(), &asked),
        ("a.jsonl", r#"{"prompt": "Capital of Mali: ", "completion": "Bamako"}"#.into(), "<s>Capital of Mali: «Bamako</s>»"),
        ("a.jsonl", r#"{"completion": "Bamako", "prompt": "Capital of Mali: ", "id": 4}"#.into(), "<s>Capital of Mali: «Bamako</s>»"),
        ("a.jsonl", r#"{"prompt": "x", "completion": ""}"#.into(), "<s>x«</s>»"),
        ("a.csv", "prompt,completion\n\"a, b\",\"c \"\"d\"\"\"\n".into(), "<s>a, b«c \"d\"</s>»"),
        ("a.CSV", "prompt,completion\r\n\"a\nb\",c\r\n".into(), "<s>a\nb«c</s>»"),
        ("a.jsonl", r#"{"input": "x", "output": "y", "n": 3}"#.into(), "<s>x«y</s>»"),
        ("a.jsonl", r#"{"text": "one"}"#.into(), "<s>«one</s>»"),
        ("a.jsonl", r#"{"text": "one</s>"}"#.into(), "<s>«one</s>»"),
        ("a.jsonl", r#"{"text": "one", "meta": {"url": "x"}, "score": 0.5}"#.into(), "<s>«one</s>»"),
        ("a.json", "[\n  {\n    \"text\": \"one\"\n  }\n]\n".into(), "<s>«one</s>»"),
        ("a.csv", "text\none\n".into(), "<s>«one</s>»"),
        ("a.csv", "text,label\none,\n".into(), "<s>«one</s>»"),
    ];
    for (name, bytes, expected) in cases {
        assert_eq!(rows(name, bytes.as_bytes()), [*expected], "{name}: {bytes}");
    }
}

#[test]
fn conversations_of_other_programs_are_read() {
    let asked = chatml(&[("user", MALI), ("assistant", "«Bamako.")]);
    let system = chatml(&[("system", "Be brief."), ("user", MALI), ("assistant", "«Bamako.")]);
    for (line, expected) in [
        (
            r#"{"conversations": [{"from": "human", "value": "Capital of Mali?"}, {"from": "gpt", "value": "Bamako."}]}"#,
            &asked,
        ),
        (
            r#"{"conversations": [{"role": "user", "content": "Capital of Mali?"}, {"role": "model", "content": "Bamako."}]}"#,
            &asked,
        ),
        (
            r#"{"messages": [{"role": "User", "content": [{"type": "text", "text": "Capital of Mali?", "image_url": null}]}, {"role": "assistant", "content": [{"type": "text", "text": "Bamako."}, null]}]}"#,
            &asked,
        ),
        (
            r#"{"prompt": [{"role": "user", "content": "Capital of Mali?"}], "completion": [{"role": "assistant", "content": "Bamako."}]}"#,
            &asked,
        ),
        (r#"{"prompt": [{"role": "user", "content": "Capital of Mali?"}], "completion": "Bamako."}"#, &asked),
        (
            r#"{"messages": "[{\"role\": \"user\", \"content\": \"Capital of Mali?\"}, {\"role\": \"assistant\", \"content\": \"Bamako.\"}]"}"#,
            &asked,
        ),
        (
            r#"{"messages": [{"role": "user", "content": "Capital of Mali?", "weight": 1}, {"role": "assistant", "content": "Bamako.", "weight": 1, "tool_calls": []}]}"#,
            &asked,
        ),
        (
            r#"{"system": "Be brief.", "messages": [{"role": "user", "content": "Capital of Mali?"}, {"role": "assistant", "content": "Bamako."}]}"#,
            &system,
        ),
        (
            r#"{"system": "Be brief.", "conversations": [{"from": "human", "value": "Capital of Mali?"}, {"from": "bot", "value": "Bamako."}]}"#,
            &system,
        ),
        (r#"{"system": "Be brief.", "instruction": "Capital of Mali?", "input": "", "output": "Bamako."}"#, &system),
        (r#"{"query": "Capital of Mali?", "response": "Bamako."}"#, &asked),
        (r#"{"question": "Capital of Mali?", "answer": "Bamako.", "source": "atlas"}"#, &asked),
        (r#"{"Instruction": "Capital of Mali?", "Response": "Bamako."}"#, &asked),
        (r#"{"prompt": "Capital of Mali?", "response": "Bamako."}"#, &asked),
        (r#"{"text": "Capital of Mali?", "label": "Bamako."}"#, &asked),
    ] {
        assert_eq!(&row(line), expected, "{line}");
    }
    let history = r#"{"instruction": "And of Mali?", "input": "", "output": "Bamako.", "system": "s", "history": [["Of Togo?", "Lome."]]}"#;
    let expected = [
        ("system", "s"),
        ("user", "Of Togo?"),
        ("assistant", "«Lome."),
        ("user", "And of Mali?"),
        ("assistant", "«Bamako."),
    ];
    assert_eq!(row(history), chatml(&expected));
    let dolly = r#"{"instruction": "Capital?", "context": "Mali", "response": "Bamako.", "category": "qa"}"#;
    assert_eq!(row(dolly), chatml(&[("user", "Capital?\n\nMali"), ("assistant", "«Bamako.")]));
    let partly = r#"{"messages": [{"role": "user", "content": "u"}, {"role": "gpt", "content": "Io."}, {"role": "user", "content": "v"}, {"role": "assistant", "content": "Titan."}]}"#;
    assert_eq!(row(partly), chatml(&[("user", "u"), ("assistant", "«Io."), ("user", "v"), ("assistant", "«Titan.")]));
}

#[test]
fn turns_that_are_marked_are_context() {
    let expected = chatml(&[("user", "u"), ("assistant", "Lagos."), ("user", "v"), ("assistant", "«N'Djamena.")]);
    for (off, on) in [
        ("\"train\": false", "\"train\": true"),
        ("\"weight\": 0", "\"weight\": 1"),
        ("\"loss\": false", "\"loss\": true"),
        ("\"trainable\": false", "\"id\": 1"),
    ] {
        let line = format!(
            r#"{{"messages": [{{"role": "user", "content": "u"}}, {{"role": "assistant", "content": "Lagos.", {off}}}, {{"role": "user", "content": "v"}}, {{"role": "assistant", "content": "N'Djamena.", {on}}}]}}"#
        );
        assert_eq!(row(&line), expected, "{off}");
    }
    // Answers in a prompt were given before.
    let prompt = r#"{"prompt": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "Lagos."}, {"role": "user", "content": "v"}], "completion": [{"role": "assistant", "content": "N'Djamena."}]}"#;
    assert_eq!(row(prompt), expected);
}

#[test]
fn tables_packed_files_and_folders_are_read() {
    let expected = ["<s>x«b</s>»", "<s>c«d</s>»"];
    let lines = "{\"prompt\": \"x\", \"completion\": \"b\"}\n{\"prompt\": \"c\", \"completion\": \"d\"}\n";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(lines.as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = ruzstd::encoding::compress_to_vec(lines.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest);
    for (name, bytes) in [
        ("a.csv", b"prompt;completion\nx;b\nc;d\n".to_vec()),
        ("a.csv", b"prompt\tcompletion\nx\tb\nc\td\n".to_vec()),
        ("a.tsv", b"prompt\tcompletion\nx\tb\nc\td\n".to_vec()),
        ("a.jsonl.gz", gzip.clone()),
        ("a.jsonl", gzip.clone()),
        ("a.jsonl.zst", zstd.clone()),
        ("a.jsonl", zstd),
    ] {
        assert_eq!(rows(name, &bytes), expected, "{name}");
    }
    let damaged = refused("a.jsonl.gz", gzip.get(..gzip.len() - 9).unwrap());
    assert!(damaged.contains("packed with gzip and cannot be unpacked"), "{damaged}");
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("README.md", "no rows");
    write("2.jsonl", "{\"prompt\": \"c\", \"completion\": \"d\"}\n");
    write("1.csv", "prompt,completion\nx,b\n");
    let (rows, data) = build_path(folder.path(), None, &ReadOptions::AUTO).unwrap();
    assert_eq!(rows, expected);
    assert_eq!(data.examples.iter().map(|example| example.row).collect::<Vec<_>>(), [0, 1]);
    write("2.jsonl", "{\"prompt\": \"c\", \"completion\": 3}\n");
    let error = build_path(folder.path(), None, &ReadOptions::AUTO).unwrap_err().to_string();
    assert!(error.contains("2.jsonl, line 1: column completion is 3"), "{error}");
    let empty = tempfile::tempdir().unwrap();
    let error = build_path(empty.path(), None, &ReadOptions::AUTO).unwrap_err().to_string();
    assert!(error.contains("holds no data file"), "{error}");
}

#[test]
fn json_that_can_mean_one_thing_only_is_read() {
    for text in [
        "{\n  \"text\": \"one\"\n}\n{\n  \"text\": \"two\"\n}\n",
        "{\n  \"text\": \"one\"\n},\n{\n  \"text\": \"two\"\n}",
        "{\"text\": \"one\"},\n{\"text\": \"two\"},\n",
        "\u{FEFF}{\"text\": \"one\"}\n\u{FEFF}{\"text\": \"two\"}\n",
        "{\"text\": \"one\", \"score\": NaN}\n{\"text\": \"two\", \"score\": -Infinity}\n",
        "[{\"text\": \"one\", \"score\": NaN}, {\"text\": \"two\"},]",
    ] {
        assert_eq!(rows("a.jsonl", text.as_bytes()), ["<s>«one</s>»", "<s>«two</s>»"], "{text}");
    }
    assert_eq!(row("{\n  \"text\": \"one\"\n}"), "<s>«one</s>»");
    assert_eq!(row(r#"{"text": "NaN"}"#), "<s>«NaN</s>»");
    assert_eq!(
        row(r#"{"instruction": "Add.", "input": NaN, "output": "four"}"#),
        chatml(&[("user", "Add."), ("assistant", "«four")])
    );
    // Lines go on being counted behind objects over several.
    let error = refused("a.jsonl", b"{\n  \"text\": \"one\"\n}\n{\"text\": \"two\"}\n{\"text\": 3}\n");
    assert!(error.contains("line 5: column text is 3"), "{error}");
}

#[test]
fn the_cause_is_named() {
    let cases: &[(&str, &[u8], &[&str])] = &[
        (
            "a.jsonl",
            br#"{"text": "party \ud83d time"}"#,
            &["line 1", "\\ud83d is half a character", "leave the row out"],
        ),
        ("a.jsonl", b"{'text': 'a'}", &["line 1", "as Python writes it", "json.dumps"]),
        ("a.jsonl", br#"{"text": "a", "n": None}"#, &["as Python writes it"]),
        ("a.jsonl", br#"{"text": "a"} {"text": "b"}"#, &["something follows the object"]),
        (
            "a.jsonl",
            br#"{"text": "a", "output": NaN, "instruction": "i"}"#,
            &["line 1", "NaN where a text was missing"],
        ),
        ("a.json", br#"{"version": 1, "data": [{"text": "a"}]}"#, &["its rows are the list under the key \"data\""]),
        ("a.json", br#"{"text": {"0": "a", "1": "b"}}"#, &["one object of columns", "orient=\"records\""]),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x\n", &["Git LFS pointer", "git lfs pull"]),
        ("a.jsonl", b"<!DOCTYPE html>\n", &["HTML"]),
        ("a.xlsx", b"PK\x03\x04rest", &["spreadsheet", "save the spreadsheet as CSV"]),
        ("a.csv", b"\xFF\xFEt\0e\0", &["UTF-16", "save it as UTF-8"]),
        ("a.jsonl.xz", b"\xFD7zXZ\x00\x00", &["unxz"]),
        ("a.parquet", b"{}", &["no Parquet file"]),
        (
            "a.jsonl",
            br#"{"prompt": "q", "chosen": "a", "rejected": "b"}"#,
            &["preference rows", "DPO", "data.columns.completion=chosen"],
        ),
        ("a.jsonl", br#"{"prompt": "q", "completion": "a", "label": true}"#, &["label", "KTO"]),
        ("a.jsonl", br#"{"messages": [{"role": "asistant", "content": "a"}]}"#, &["asistant", "nearly one"]),
        (
            "a.jsonl",
            br#"{"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]}"#,
            &["messages[0].content[0]", "text alone"],
        ),
        ("a.jsonl", br#"{"text": "a", "images": ["x.png"]}"#, &["images", "text alone", "data.unknown_columns=note"]),
        (
            "a.jsonl",
            br#"{"system": "s", "prompt": "p", "completion": "c"}"#,
            &["system is not read in rows of this format"],
        ),
        (
            "a.jsonl",
            br#"{"question": "q", "query": "r", "answer": "a"}"#,
            &["\"question\", \"query\" could each be \"instruction\""],
        ),
        ("a.csv", b"messages\n\"[{'role': 'user', 'content': 'x'}]\"\n", &["line 2", "json.dumps"]),
    ];
    for (name, bytes, words) in cases {
        let error = refused(name, bytes);
        for word in *words {
            assert!(error.contains(word), "{word:?} is not in {error}");
        }
    }
    let unlike = refused("a.jsonl", br#"{"qqq": "p", "zzz": "c"}"#);
    assert!(!unlike.contains("nearest"), "{unlike}");
}

#[test]
fn what_is_not_read_is_counted_or_refused() {
    let lines = r#"{"text": "one", "id": 1, "url": "u", "note": null}
{"text": "two", "url": "u", "note": "n"}
"#;
    let report = build("a.jsonl", lines.as_bytes(), None, &ReadOptions::AUTO).unwrap().1.report;
    let counted =
        |counts: &[Counted]| counts.iter().map(|c| (c.name.clone(), c.rows.first_lines.clone())).collect::<Vec<_>>();
    assert_eq!(
        counted(&report.reading.columns_not_read),
        [("url".to_owned(), vec![1, 2]), ("note".to_owned(), vec![2])]
    );
    let strict = ReadOptions { unknown_columns: UnknownColumns::Refuse, ..ReadOptions::AUTO };
    let error = build("a.jsonl", lines.as_bytes(), None, &strict).unwrap_err().to_string();
    assert!(error.contains("line 1: url is not read"), "{error}");
    let lax = ReadOptions { unknown_columns: UnknownColumns::Note, ..ReadOptions::AUTO };
    let image = br#"{"text": "a", "images": ["x.png"]}"#;
    let report = build("a.jsonl", image, None, &lax).unwrap().1.report;
    assert_eq!(report.reading.columns_not_read[0].name, "images");
    let chat =
        br#"{"messages": [{"role": "critic", "content": "c", "mood": "m"}, {"role": "assistant", "content": "a"}]}"#;
    let reading = build("a.jsonl", chat, None, &ReadOptions::AUTO).unwrap().1.report.reading;
    assert_eq!((reading.keys_not_read[0].name.as_str(), reading.other_roles[0].name.as_str()), ("mood", "critic"));
    let taken = build("a.jsonl", br#"{"query": "q", "response": "r"}"#, None, &ReadOptions::AUTO)
        .unwrap()
        .1
        .report
        .reading
        .taken;
    let taken: Vec<_> = taken.iter().map(|taken| (taken.column.as_str(), taken.taken_as.as_str())).collect();
    assert_eq!(taken, [("query", "instruction"), ("response", "output")]);
}

#[test]
fn bad_rows_can_be_left_out() {
    let lines = "{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}\n\
        {\"messages\": [\n{\"messages\": 3}\n{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}]}\n";
    let skip = ReadOptions { on_bad_row: OnBadRow::Skip, ..ReadOptions::AUTO };
    let (rows, data) = build("a.jsonl", lines.as_bytes(), None, &skip).unwrap();
    assert_eq!(rows, [chatml(&[("user", "u"), ("assistant", "«a")])]);
    let reading = &data.report.reading;
    assert_eq!((reading.skipped.count, &reading.skipped.first_lines[..]), (3, &[2, 3, 4][..]));
    assert!(reading.first_skipped.as_ref().unwrap().contains("line 2"));
    let none = build("a.jsonl", b"{\"text\": 1}\n{\"text\": 2}\n", None, &skip).unwrap_err().to_string();
    assert!(none.contains("2 are left out") && none.contains("line 1: column text is 1"), "{none}");
}

const TOOLS: &str = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}\
    {{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}({{ c.function.arguments | tojson }})</call>\
    {% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

#[test]
fn a_row_that_is_cut_off_leaves_the_texts_of_others_alone() {
    let bytes = b"{\"text\": \"cut off\n{\"text\": \"Avengers: Infinity War\"}\n{\"text\": \"a\", \"score\": NaN}\n{\"text\": \"NaN is no number\"}\n";
    let skip = ReadOptions { on_bad_row: OnBadRow::Skip, ..ReadOptions::AUTO };
    let (rows, data) = build("rows.jsonl", bytes, None, &skip).unwrap();
    assert_eq!(data.report.reading.skipped, RowCount { count: 1, first_lines: vec![1] });
    let texts = ["Avengers: Infinity War", "a", "NaN is no number"];
    assert_eq!(rows, texts.map(|text| row(&format!("{{\"text\": \"{text}\"}}"))));
}

#[test]
fn a_column_input_that_is_asked_is_asked_once() {
    let expected = row(r#"{"instruction": "Which tree?", "output": "Larch"}"#);
    for (asked, answer) in [("input", "response"), ("input", "label"), ("Input", "target")] {
        assert_eq!(row(&format!("{{\"{asked}\": \"Which tree?\", \"{answer}\": \"Larch\"}}")), expected);
    }
}

#[test]
fn tools_calls_and_thoughts_reach_the_template_or_are_said_not_to() {
    let line = r#"{"messages": [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}]}, {"role": "tool", "tool_call_id": "c1", "content": "6 m"}, {"role": "assistant", "content": "6 metres.", "reasoning_content": "I see."}], "tools": [{"type": "function", "function": {"name": "tide", "description": "d"}}]}"#;
    let as_text = line.replace(
        r#""tools": [{"type": "function", "function": {"name": "tide", "description": "d"}}]"#,
        r#""tools": "[{\"type\": \"function\", \"function\": {\"name\": \"tide\", \"description\": \"d\"}}]""#,
    );
    let expected = chatml(&[
        ("tools", r#"[{"type": "function", "function": {"name": "tide", "description": "d"}}]"#),
        ("user", "Tide?"),
        ("assistant", "«<call>tide({\"port\": \"Brest\"})</call>"),
        ("tool", "6 m"),
        ("assistant", "«<think>I see.</think>6 metres."),
    ]);
    for line in [line, &as_text] {
        let (rows, data) = build("a.jsonl", line.as_bytes(), Some(TOOLS), &ReadOptions::AUTO).unwrap();
        assert_eq!(rows, [expected.as_str()]);
        assert!(data.report.left_out_by_template.is_empty());
    }
    let (_, data) = build("a.jsonl", line.as_bytes(), None, &ReadOptions::AUTO).unwrap();
    let left_out: Vec<_> = data.report.left_out_by_template.iter().map(|counted| counted.name.as_str()).collect();
    assert_eq!(left_out, ["tool_calls", "reasoning_content", "tools"]);
}

#[test]
fn what_a_template_does_to_answers_is_counted() {
    const CUTS: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ (m.content.split('</think>')[-1]).strip() }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let lines = r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "<think>x</think>Io."}]}
{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "Io.\n"}]}
{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "Io."}]}
"#;
    let report = build("a.jsonl", lines.as_bytes(), Some(CUTS), &ReadOptions::AUTO).unwrap().1.report;
    assert_eq!(
        (report.answers_changed.first_lines.as_slice(), report.answers_trimmed.first_lines.as_slice()),
        (&[1][..], &[2][..])
    );
    let (answer, written) = report.first_changed.unwrap();
    assert!(answer.contains("<think>") && written.starts_with("Io."), "{written}");
}

#[test]
fn special_tokens_that_are_spelled_out_are_counted() {
    let lines = r#"{"messages": [{"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "An end."}]}
{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "It is <|im_end|>"}]}
{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a <|im_start|> b"}]}
"#;
    let report = build("a.jsonl", lines.as_bytes(), None, &ReadOptions::AUTO).unwrap().1.report;
    assert_eq!(report.special_in_answers.first_lines, [2]);
    assert_eq!(report.special_in_texts.first_lines, [1, 3]);
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_of_pandas_polars_and_datasets_is_read_as_the_same_rows() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/rows");
    let texts = |name: &str| -> Vec<RowText> {
        let file = read_rows(&Files::from(&goldens.join(name)), &ReadOptions::AUTO)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        file.rows.into_iter().map(|row| row.text).collect()
    };
    for name in ["pairs_pandas.parquet", "pairs_polars.parquet"] {
        assert_eq!(texts(name), texts("pairs.jsonl"), "{name}");
    }
    for name in ["chats_structs.parquet", "chats_json.parquet"] {
        assert_eq!(texts(name), texts("chats.jsonl"), "{name}");
    }
    for name in ["lists_wide.parquet", "lists_narrow.parquet"] {
        assert_eq!(texts(name), texts("chats.jsonl")[..1], "{name}");
    }
    // JSON text is what it stands for, and a class its name.
    let learnt = |text: &str, label: &str| RowText::Instruction {
        instruction: text.into(),
        input: String::new(),
        output: label.into(),
    };
    assert_eq!(texts("features.parquet"), [learnt("It \"works\".", "good"), learnt("No.", "bad")]);
}

#[cfg(feature = "parquet")]
#[test]
fn no_cut_or_garbled_parquet_file_panics() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/rows");
    let whole = std::fs::read(goldens.join("chats_json.parquet")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let mut state = 1u64;
    for _ in 0..400 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let mut bytes = whole.clone();
        let at = (state >> 33) as usize % bytes.len();
        bytes[at] = (state >> 25) as u8;
        if state & 64 == 0 {
            bytes.truncate(at);
        }
        std::fs::write(&path, &bytes).unwrap();
        let _ = read_rows(&Files::from(&path), &ReadOptions::AUTO);
    }
}
