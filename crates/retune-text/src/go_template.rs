//! A chat template in the language of Ollama's Modelfiles, Go's `text/template`.
//!
//! Most chat templates put the same texts around every turn. Those are found by rendering conversations of marks, and put together as a Go
//! template; whether that is all the template does is seen by rendering other conversations both ways.

use crate::chat_template::{ChatTemplate, Message};

const SYSTEM: &str = "system";
const USER: &str = "user";
const ASSISTANT: &str = "assistant";

/// The texts that a chat template puts around turns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turns {
    /// Before a conversation that begins with no system message.
    default: String,
    /// Before and after a turn; a template that refuses a system message has none for it.
    system: Option<[String; 2]>,
    user: [String; 2],
    assistant: [String; 2],
    /// What opens an answer.
    prompt: String,
}

impl Turns {
    /// Those of a template, if that puts texts around turns and nothing else. `bos` is the text of a token that whoever runs the model puts
    /// first, and that is left out here.
    pub fn of(template: &ChatTemplate, bos: &str) -> Option<Self> {
        let turns = Self::found(template, bos)?;
        let conversations: [&[(&str, &str)]; 4] = [
            &[(USER, "Hi")],
            &[(USER, "a b"), (ASSISTANT, "c\nd"), (USER, "e")],
            &[(SYSTEM, "Be brief."), (USER, "Why?")],
            &[(SYSTEM, "x"), (USER, "y"), (ASSISTANT, "z"), (USER, "1"), (ASSISTANT, "2"), (USER, "3")],
        ];
        let fits = |conversation: &&[(&str, &str)]| match render(template, bos, conversation, true) {
            Some(text) => text == turns.render(conversation),
            None => conversation[0].0 == SYSTEM && turns.system.is_none(),
        };
        conversations.iter().all(fits).then_some(turns)
    }

    fn found(template: &ChatTemplate, bos: &str) -> Option<Self> {
        const MARKS: [&str; 4] = ["%1%", "%2%", "%3%", "%4%"];
        let [s, u, a, v] = MARKS;
        // What stands before, between and after the marks of a conversation.
        let pieces = |conversation: &[(&str, &str)], prompt: bool| {
            let mut rest = render(template, bos, conversation, prompt)?;
            let mut pieces = Vec::new();
            for (_, mark) in conversation {
                let (before, after) = rest.split_once(mark)?;
                pieces.push(before.to_owned());
                rest = after.to_owned();
            }
            pieces.push(rest);
            Some(pieces)
        };
        let opened = pieces(&[(USER, u)], true)?;
        let closed = pieces(&[(USER, u)], false)?;
        let long = pieces(&[(USER, u), (ASSISTANT, a), (USER, v)], false)?;
        let user_end = closed[1].clone();
        let prompt = opened[1].strip_prefix(user_end.as_str())?.to_owned();
        let assistant_start = long[1].strip_prefix(user_end.as_str())?.to_owned();
        let with_system = pieces(&[(SYSTEM, s), (USER, u)], false);
        let lone_system = pieces(&[(SYSTEM, s)], false);
        let system_end = lone_system.as_ref().map(|pieces| pieces[1].clone());
        let user_start = match (&with_system, &system_end) {
            (Some(pieces), Some(end)) => pieces[1].strip_prefix(end.as_str())?.to_owned(),
            _ => closed[0].clone(),
        };
        let assistant_end = long[2].strip_suffix(user_start.as_str())?.to_owned();
        let default = closed[0].strip_suffix(user_start.as_str())?.to_owned();
        let system = with_system.zip(system_end).map(|(pieces, end)| [pieces[0].clone(), end]);
        let (user, assistant) = ([user_start, user_end], [assistant_start, assistant_end]);
        Some(Self { default, system, user, assistant, prompt })
    }

    /// What the Go template makes of a conversation that ends with a question.
    fn render(&self, conversation: &[(&str, &str)]) -> String {
        let mut text = if conversation[0].0 == SYSTEM { String::new() } else { self.default.clone() };
        for (role, content) in conversation {
            let [before, after] = match *role {
                SYSTEM => self.system.as_ref().unwrap_or(&self.user),
                USER => &self.user,
                _ => &self.assistant,
            };
            text += &format!("{before}{content}{after}");
        }
        text + &self.prompt
    }

    /// The Go template. An answer that is last is left open, to be continued.
    pub fn go_template(&self) -> String {
        let turn = |[before, after]: &[String; 2]| format!("{}{{{{ .Content }}}}{}", quoted(before), quoted(after));
        let [open, close] = &self.assistant;
        let system = self.system.as_ref().unwrap_or(&self.user);
        let default = match self.default.as_str() {
            "" => String::new(),
            text => format!("{{{{ if ne (index .Messages 0).Role \"system\" }}}}{}{{{{ end }}}}", quoted(text)),
        };
        format!(
            "{default}{{{{ range $i, $_ := .Messages }}}}{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}\
             {{{{ if eq .Role \"system\" }}}}{}{{{{ else if eq .Role \"user\" }}}}{}{{{{ else if eq .Role \"assistant\" }}}}{}{{{{ .Content }}}}\
             {{{{ if not $last }}}}{}{{{{ end }}}}{{{{ end }}}}\
             {{{{ if and $last (ne .Role \"assistant\") }}}}{}{{{{ end }}}}{{{{ end }}}}",
            turn(system),
            turn(&self.user),
            quoted(open),
            quoted(close),
            quoted(&self.prompt),
        )
    }
}

/// A text as an action that prints it: spaces and braces stay what they are.
fn quoted(text: &str) -> String {
    if text.is_empty() {
        return String::new();
    }
    // What JSON escapes, Go's strings do, and in the same way.
    format!("{{{{ {} }}}}", serde_json::Value::from(text))
}

fn render(template: &ChatTemplate, bos: &str, conversation: &[(&str, &str)], prompt: bool) -> Option<String> {
    let message = |(role, content): &(&str, &str)| Message::new(*role, *content);
    let messages: Vec<Message> = conversation.iter().map(message).collect();
    let text = template.render(&messages, prompt).ok()?;
    Some(text.strip_prefix(bos).map_or_else(|| text.clone(), str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(source: &str) -> Option<Turns> {
        Turns::of(&ChatTemplate::new(source, "<s>", "</s>").unwrap(), "<s>")
    }

    const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
                          {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn chatml_is_put_together() {
        let turns = turns(CHATML).unwrap();
        assert_eq!(turns.system, Some(["<|im_start|>system\n".to_owned(), "<|im_end|>\n".to_owned()]));
        assert_eq!((turns.default.as_str(), turns.prompt.as_str()), ("", "<|im_start|>assistant\n"));
        let go = turns.go_template();
        assert!(
            go.contains(r#"{{ if eq .Role "system" }}{{ "<|im_start|>system\n" }}{{ .Content }}{{ "<|im_end|>\n" }}"#)
        );
        assert!(go.ends_with(r#"{{ "<|im_start|>assistant\n" }}{{ end }}{{ end }}"#), "{go}");
    }

    #[test]
    fn a_default_system_message_stands_where_none_is_given() {
        let source = format!(
            "{{% if messages[0]['role'] != 'system' %}}{{{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}}}{{% endif %}}{CHATML}"
        );
        let turns = turns(&source).unwrap();
        assert_eq!(turns.default, "<|im_start|>system\nBe kind.<|im_end|>\n");
        assert!(
            turns.go_template().starts_with(r#"{{ if ne (index .Messages 0).Role "system" }}{{ "<|im_start|>system"#)
        );
    }

    #[test]
    fn what_refuses_a_system_message_takes_it_as_a_question() {
        let source = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}\
                      {% for m in messages %}{{ '<t>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] + '</t>\n' }}\
                      {% endfor %}{% if add_generation_prompt %}{{ '<t>model\n' }}{% endif %}";
        let turns = turns(source).unwrap();
        assert_eq!((turns.system.clone(), turns.default.as_str()), (None, ""));
        assert!(turns.go_template().contains(r#"{{ if eq .Role "system" }}{{ "<t>user\n" }}"#));
    }

    #[test]
    fn templates_that_do_more_are_none() {
        // The content is changed; a number is counted; the last question is special.
        let changed = CHATML.replace("message['content']", "message['content'] | upper");
        let counted = CHATML.replace("message['content']", "message['content'] + loop.index | string");
        let last = CHATML.replace("'<|im_end|>\n'", "('<|im_end|>\n' if loop.last else '|')");
        for source in [changed, counted, last] {
            assert_eq!(turns(&source), None, "{source}");
        }
    }
}
