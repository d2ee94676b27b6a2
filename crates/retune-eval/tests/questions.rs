//! Rows are asked and labelled in the tokens that training would see.

use retune_eval::questions::{question, with_labels};
use retune_train::data::{EncodeOptions, Encoder, Names, OnBadRow, Overlong, Row, RowText};

fn options(max_length: usize) -> EncodeOptions {
    EncodeOptions {
        max_length,
        overlong: Overlong::Truncate,
        on_bad_row: OnBadRow::Stop,
        train_on_prompt: false,
        has_encoder: false,
        names: Names::KEYS,
    }
}

fn row(prompt: &str, completion: &str) -> Row {
    let text = RowText::PromptCompletion { prompt: prompt.into(), completion: completion.into() };
    Row { index: 7, line: 8, text }
}

#[test]
fn a_question_is_what_stands_before_the_answer_in_training() {
    let tokenizer = retune_testing::checkpoint("gguf_llama").tokenizer().unwrap();
    let encoder = Encoder::new(&tokenizer, options(100)).unwrap();
    let row = row("the sand of", " time\n");
    let example = encoder.encode_whole(&row).unwrap();
    let found = question(&encoder, &row).unwrap().unwrap();
    assert_eq!((found.row, found.reference.as_str()), (7, "time"));
    let (prompt, answer) = example.ids.split_at(found.prompt.len());
    assert_eq!(prompt, found.prompt);
    assert_eq!(tokenizer.decode(answer, true), " time\n");
    assert!(example.trained[..prompt.len()].iter().all(|trained| !trained));

    let within = |max_length| {
        let encoder = Encoder::new(&tokenizer, options(max_length)).unwrap();
        question(&encoder, &row).unwrap().is_some()
    };
    assert!(within(prompt.len() + 1) && !within(prompt.len()), "an answer of which nothing is scored");
    let text = Row { text: RowText::Text("the sand".into()), ..row };
    assert_eq!(question(&encoder, &text).unwrap(), None);
    assert_eq!(with_labels(&encoder, &text, &["on".to_owned()]).unwrap(), None);
}

#[test]
fn labels_are_compared_from_the_first_token_that_is_not_every_labels() {
    let tokenizer = retune_testing::checkpoint("gguf_llama").tokenizer().unwrap();
    let encoder = Encoder::new(&tokenizer, options(100)).unwrap();
    // The last letter of the prompt goes on into the first label ("he"), and not into the second.
    let labels = ["e", "on"].map(str::to_owned);
    let row = row("th", "on");
    let alone = labels.each_ref().map(|label| {
        let text = row.text.with_answer(label).unwrap();
        encoder.encode_whole(&Row { text, ..row }).unwrap()
    });
    let first = |trained: &[bool]| trained.iter().position(|&trained| trained).unwrap();
    let starts = alone.each_ref().map(|example| first(&example.trained));
    assert!(starts[0] < starts[1], "{starts:?}");
    let found = with_labels(&encoder, &row, &labels).unwrap().unwrap();
    for (example, alone) in found.iter().zip(&alone) {
        assert_eq!((first(&example.trained), &example.ids), (starts[0], &alone.ids));
        assert!(example.trained[starts[0]..].iter().all(|&trained| trained), "up to the token that ends it");
        assert_eq!(example.ids[..starts[0]], found[0].ids[..starts[0]]);
    }
    let longest = found.iter().map(|example| example.ids.len()).max().unwrap();
    let fits = |max_length| {
        let encoder = Encoder::new(&tokenizer, options(max_length)).unwrap();
        with_labels(&encoder, &row, &labels).unwrap().is_some()
    };
    assert!(fits(longest) && !fits(longest - 1), "a label that is cut is no label");
}
