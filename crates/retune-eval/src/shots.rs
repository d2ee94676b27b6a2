//! Examples put before each row: a hard prompt of k rows with their answers.

use std::collections::{HashMap, HashSet, VecDeque};

use retune_text::chat_template::{Conversation, Message};
use retune_train::data::{Row, RowText, instruction_messages, order, plain_prompt};

/// What stands between two rows that are no conversations.
const BETWEEN: &str = "\n\n";

/// Chooses `count` rows as examples: by a seed, and as many of each label as of another where `labels` are given. Rows that say what one of
/// `scored` says are passed over, as are those without an answer or, with labels, with another one. There may be fewer than asked for.
pub fn choose<'a>(rows: &'a [Row], count: usize, seed: u64, labels: Option<&[String]>, scored: &[Row]) -> Vec<&'a Row> {
    let scored: HashSet<&RowText> = scored.iter().map(|row| &row.text).collect();
    let mut by_label: Vec<VecDeque<&Row>> = Vec::new();
    let mut queues: HashMap<&str, usize> = HashMap::new();
    for at in order(seed, 0, rows.len(), true) {
        let Some(row) = rows.get(at).filter(|row| !scored.contains(&row.text)) else { continue };
        let Some(answer) = row.text.answers().last().map(|answer| answer.trim()) else { continue };
        let label = match labels {
            Some(labels) if labels.iter().any(|label| label == answer) => answer,
            Some(_) => continue,
            None => "",
        };
        let queue = *queues.entry(label).or_insert(by_label.len());
        if queue == by_label.len() {
            by_label.push(VecDeque::new());
        }
        if let Some(queue) = by_label.get_mut(queue) {
            queue.push_back(row);
        }
    }
    let mut chosen = Vec::with_capacity(count);
    while chosen.len() < count && by_label.iter().any(|queue| !queue.is_empty()) {
        let round: Vec<&Row> = by_label.iter_mut().filter_map(VecDeque::pop_front).collect();
        chosen.extend(round.into_iter().take(count - chosen.len()));
    }
    chosen
}

/// A row after examples of its own format: earlier turns of one conversation where rows are conversations, or instructions for a model `with_chat`
/// template; otherwise the examples as text, a blank line after each. A text is left as it is.
pub fn after(examples: &[&Row], row: &RowText, with_chat: bool) -> RowText {
    if let Some(turns) = turns(row, with_chat) {
        let system = turns.iter().take_while(|turn| turn.role == "system").count();
        let (system, own) = turns.split_at(system);
        let mut all = system.to_vec();
        for example in examples.iter().filter_map(|example| self::turns(&example.text, with_chat)) {
            let answers = example.iter().rposition(|turn| turn.role == "assistant").map_or(0, |last| last + 1);
            all.extend(example.into_iter().take(answers).filter(|turn| turn.role != "system"));
        }
        all.extend_from_slice(own);
        let variables = match row {
            RowText::Chat(own) => own.variables.clone(),
            _ => Default::default(),
        };
        return RowText::Chat(Conversation { messages: all, variables });
    }
    let Some((prompt, completion)) = pair(row) else { return row.clone() };
    let examples = examples.iter().filter_map(|example| pair(&example.text));
    let before: String = examples.flat_map(|(prompt, answer)| [prompt, answer, BETWEEN.to_owned()]).collect();
    RowText::PromptCompletion { prompt: before + &prompt, completion }
}

/// How many answers of a conversation examples are; 0 where they are text before a prompt.
pub fn answers(examples: &[&Row], with_chat: bool) -> usize {
    let turns = examples.iter().filter_map(|example| turns(&example.text, with_chat)).flatten();
    turns.filter(|turn| turn.role == "assistant").count()
}

/// The row as a conversation, if it is one.
fn turns(row: &RowText, with_chat: bool) -> Option<Vec<Message>> {
    match row {
        RowText::Chat(conversation) => Some(conversation.messages.clone()),
        RowText::Instruction { instruction, input, output } if with_chat => {
            Some(instruction_messages(instruction, input, output).to_vec())
        }
        _ => None,
    }
}

/// The row as a prompt and its completion, if it is no conversation.
fn pair(row: &RowText) -> Option<(String, String)> {
    match row {
        RowText::PromptCompletion { prompt, completion } => Some((prompt.clone(), completion.clone())),
        RowText::Instruction { instruction, input, output } => Some((plain_prompt(instruction, input), output.clone())),
        RowText::Chat(_) | RowText::Text(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows whose answers are those given, in turn.
    fn rows(answers: &[&str], count: usize) -> Vec<Row> {
        let text = |n: usize| RowText::Instruction {
            instruction: "Which?".into(),
            input: n.to_string(),
            output: answers[n % answers.len()].into(),
        };
        (0..count).map(|index| Row { index, line: index + 1, text: text(index) }).collect()
    }

    fn answers_of(rows: &[&Row]) -> Vec<String> {
        rows.iter().map(|row| row.text.answers()[0].trim().to_owned()).collect()
    }

    #[test]
    fn every_label_is_shown_as_often_as_another() {
        // One label in six rows of ten.
        let all = rows(&["a", "a", "b ", "a", "c", "a", "a", "b", "a", "other"], 200);
        let labels = ["a", "b", "c"].map(str::to_owned);
        for seed in 0..20 {
            let chosen = answers_of(&choose(&all, 7, seed, Some(&labels), &[]));
            let count = |label: &str| chosen.iter().filter(|answer| *answer == label).count();
            let mut counts = [count("a"), count("b"), count("c")];
            counts.sort_unstable();
            assert_eq!(counts, [2, 2, 3], "{chosen:?}");
        }
        let of = |seed| choose(&all, 7, seed, Some(&labels), &[]);
        assert_eq!(of(1), of(1));
        assert!((2..9).any(|seed| of(seed) != of(1)), "the seed is of no effect");
        assert!((0..20).any(|seed| answers_of(&choose(&all, 7, seed, None, &[])).contains(&"other".to_owned())));
    }

    #[test]
    fn rows_that_are_scored_and_rows_without_an_answer_are_no_examples() {
        let mut all = rows(&["a", "b"], 6);
        let scored = all[..2].to_vec();
        all.push(Row { index: 6, line: 7, text: RowText::Text("t".into()) });
        let mut chosen: Vec<usize> = choose(&all, 9, 0, None, &scored).iter().map(|row| row.index).collect();
        chosen.sort_unstable();
        assert_eq!(chosen, [2, 3, 4, 5]);
    }

    #[test]
    fn examples_are_turns_or_text() {
        let all = rows(&["a", "b"], 3);
        let examples = [&all[0], &all[1]];
        let RowText::Chat(conversation) = after(&examples, &all[2].text, true) else { panic!("no conversation") };
        let turns: Vec<_> = conversation.messages.iter().map(|turn| (turn.role.as_str(), turn.text())).collect();
        let user = ["Which?\n\n0", "Which?\n\n1", "Which?\n\n2"];
        let roles = ["user", "assistant"];
        let expected = [(0, user[0]), (1, "a"), (0, user[1]), (1, "b"), (0, user[2]), (1, "a")];
        assert_eq!(turns, expected.map(|(role, text)| (roles[role], text)));
        assert_eq!((answers(&examples, true), answers(&examples, false)), (2, 0));

        let RowText::PromptCompletion { prompt, completion } = after(&examples, &all[2].text, false) else {
            panic!("no prompt")
        };
        let prompts = ["0", "1", "2"].map(|input| plain_prompt("Which?", input));
        assert_eq!(prompt, format!("{}a\n\n{}b\n\n{}", prompts[0], prompts[1], prompts[2]));
        assert_eq!(completion, "a");
    }

    #[test]
    fn the_system_speaks_once_and_first() {
        let chat = |turns: &[(&str, &str)]| {
            let turn = |(role, content): &(&str, &str)| Message::new(*role, *content);
            RowText::Chat(turns.iter().map(turn).collect::<Vec<_>>().into())
        };
        let example = chat(&[("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "unanswered")]);
        let example = Row { index: 0, line: 1, text: example };
        let row = chat(&[("system", "S"), ("user", "U"), ("assistant", "A")]);
        let expected = [("system", "S"), ("user", "u"), ("assistant", "a"), ("user", "U"), ("assistant", "A")];
        assert_eq!(after(&[&example], &row, true), chat(&expected));
        assert_eq!(answers(&[&example], true), 1);
    }
}
