//! Chat: from messages to tokens and back, as the student's own tokenizer and chat template have it, and the grammar's mask over its vocabulary.

mod files;
mod grammar;
mod template;
mod tokenizer;

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{json, Value};
use sha2::{Digest, Sha256};

pub use grammar::Grammar;
pub use template::Template;
pub use tokenizer::{Memo, Tokenizer};

use crate::calls::{CallError, CallFormat};
use crate::episode::{Step, Task};
use crate::view::{Prompt, View, ViewError};

/// Why a tokenizer or template cannot be used, or a chat not be rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    #[error("{path}: {source}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} has {found} bytes, {limit} are allowed")]
    TooLarge {
        path: PathBuf,
        found: u64,
        limit: u64,
    },
    #[error("{path} is not what it should be: {problem}")]
    BadFile { path: PathBuf, problem: String },
    /// The tokenizer is of a kind that Locum does not know to be right about.
    #[error("unsupported tokenizer: {0}")]
    Tokenizer(String),
    /// The template cannot be compiled, or does not write turns one after another.
    #[error("unsupported chat template: {0}")]
    Template(String),
    /// The template refused these messages.
    #[error("the chat template does not render these messages: {0}")]
    Render(String),
    #[error("the grammar cannot be compiled: {0}")]
    Grammar(String),
    /// The token is not allowed where it was offered.
    #[error("token {token} ({text:?}) is not allowed by the grammar here")]
    NotAllowed { token: u32, text: String },
    #[error(transparent)]
    View(#[from] ViewError),
    #[error(transparent)]
    Call(#[from] CallError),
}

/// A student's tokenizer and chat template. Immutable and shared between threads.
pub struct Chat {
    pub tokenizer: Arc<Tokenizer>,
    pub template: Template,
    /// Tokens that end a reply; the first is the one that ends a turn of this template.
    pub eos_ids: Vec<u32>,
    /// `tokenizer_config.json` as it came, kept for [`Chat::save`].
    config: serde_json::Map<String, Value>,
    grammars: grammar::Grammars,
    digest: String,
}

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
const SYSTEM_PROBE: &str = "sigma";
const USER_PROBE: &str = "alpha";
const REPLY_PROBE: &str = "omega";

impl Chat {
    /// Puts a tokenizer and a template together.
    ///
    /// `more_eos` are tokens that end a reply besides the one that the template ends a turn with (from
    /// `generation_config.json`).
    ///
    /// # Errors
    /// [`ChatError::Template`] if an assistant's turn does not begin with the generation prompt and end with a special
    /// token: training and serving would then see different texts.
    pub fn new(
        tokenizer: Tokenizer,
        template: Template,
        more_eos: &[u32],
    ) -> Result<Chat, ChatError> {
        let user = turn("user", USER_PROBE);
        let reply = turn("assistant", REPLY_PROBE);
        let prompt = template.render(std::slice::from_ref(&user), true)?;
        let whole = template.render(&[user, reply], false)?;
        let Some(written) = whole.strip_prefix(prompt.as_str()) else {
            return Err(ChatError::Template(format!(
                "an assistant's turn does not begin with the generation prompt {:?}",
                tail(&prompt, 80)
            )));
        };
        let Some(end) = written
            .strip_prefix(REPLY_PROBE)
            .and_then(|end| tokenizer.special_at(end))
        else {
            return Err(ChatError::Template(format!(
                "an assistant's turn is expected to end with a special token, found {:?}",
                written.chars().take(80).collect::<String>()
            )));
        };
        let mut eos_ids = vec![end];
        for id in more_eos {
            if (*id as usize) < tokenizer.vocab_size() && !eos_ids.contains(id) {
                eos_ids.push(*id);
            }
        }
        let tokenizer = Arc::new(tokenizer);
        let grammars = grammar::Grammars::new(tokenizer.clone(), end)?;
        let digest = Sha256::digest(format!(
            "locum-chat/1\n{}\n{}\n{end}",
            tokenizer.digest(),
            template.digest()
        ));
        let names = [("bos_token", template.bos()), ("eos_token", template.eos())];
        let named = names.into_iter().filter(|(_, name)| !name.is_empty());
        Ok(Chat {
            config: named
                .map(|(key, name)| (key.to_string(), name.into()))
                .collect(),
            tokenizer,
            template,
            eos_ids,
            grammars,
            digest: hex(&digest),
        })
    }

    /// A tokenizer without merges under the ChatML template: every byte is a token, and id 256 ends a turn. For tests of
    /// whatever needs a chat but no model.
    pub fn byte_level() -> Chat {
        let template = Template::from_source(CHATML, "", "<|im_end|>").expect("ChatML compiles");
        Chat::new(Tokenizer::byte_level(), template, &[])
            .expect("ChatML writes turns one after another")
    }

    /// The token that ends a turn.
    pub fn end_of_turn(&self) -> u32 {
        self.eos_ids[0]
    }

    /// The prompt as text: the template's own words around the system turn (none if empty), the earlier turns and the user turn, and the
    /// beginning of the assistant's turn.
    ///
    /// # Errors
    /// [`ChatError::Render`] if the template refuses.
    pub fn prompt_text(&self, prompt: &Prompt) -> Result<String, ChatError> {
        let with = |system: Option<Value>| {
            let earlier = prompt.earlier.iter();
            let earlier =
                earlier.flat_map(|(user, reply)| [turn("user", user), turn("assistant", reply)]);
            let last = std::iter::once(turn("user", &prompt.user));
            let messages: Vec<Value> = system.into_iter().chain(earlier).chain(last).collect();
            self.template.render(&messages, true)
        };
        if !prompt.system.is_empty() {
            return with(Some(turn("system", &prompt.system)));
        }
        // Without a system message some templates put in one of their own. So the user's turn is taken out of a chat that
        // has one; where the template does not write turns one after another, it has its way.
        let system = turn("system", SYSTEM_PROBE);
        let whole = with(Some(system.clone()));
        let head = self.template.render(&[system], false);
        if let (Ok(whole), Ok(head)) = (whole, head) {
            if let Some(rest) = whole.strip_prefix(head.as_str()) {
                let bos = self.template.bos();
                // Where a turn itself begins with that token (SmolLM2), there is none before it.
                let begins = !bos.is_empty() && whole.starts_with(bos) && !rest.starts_with(bos);
                return Ok(format!("{}{rest}", if begins { bos } else { "" }));
            }
        }
        with(None)
    }

    /// The prompt as tokens. Special tokens come from the template alone: text that spells one (`<|im_end|>` in a tool's
    /// result) stays text.
    ///
    /// # Errors
    /// [`ChatError::Render`] if the template refuses.
    pub fn prompt_ids(&self, prompt: &Prompt) -> Result<Vec<u32>, ChatError> {
        self.prompt_ids_with(prompt, &Memo::default())
    }

    fn prompt_ids_with(&self, prompt: &Prompt, memo: &Memo) -> Result<Vec<u32>, ChatError> {
        let earlier = prompt.earlier.iter();
        let mut texts: Vec<&str> = earlier.flat_map(|(a, b)| [&a[..], &b[..]]).collect();
        texts.extend([&prompt.system[..], &prompt.user[..]]);
        let guard = tokenizer::Guard::new(&self.tokenizer, &texts);
        let earlier = prompt.earlier.iter();
        let guarded = Prompt {
            system: guard.hide(&prompt.system),
            earlier: earlier
                .map(|(user, reply)| (guard.hide(user), guard.hide(reply)))
                .collect(),
            user: guard.hide(&prompt.user),
        };
        Ok(self
            .tokenizer
            .encode_guarded(&self.prompt_text(&guarded)?, &guard, memo))
    }

    /// The reply's tokens and the end of the turn. `prompt_ids` followed by `reply_ids` are the tokens of the whole text
    /// for every reply that [`CallFormat::print_reply`] prints.
    pub fn reply_ids(&self, reply: &str) -> Vec<u32> {
        let mut ids = self.tokenizer.encode(reply, false);
        ids.push(self.end_of_turn());
        ids
    }

    /// A whole chat (OpenAI messages) as tokens, and which of them the assistant has to say: its texts and the ends of its
    /// turns.
    ///
    /// # Errors
    /// [`ChatError::Render`] if the template refuses; [`ChatError::Template`] if it rewrites earlier turns when later ones
    /// follow, so that no span can be told.
    pub fn spans(&self, messages: &[Value]) -> Result<(Vec<u32>, Vec<bool>), ChatError> {
        let mut contents = Vec::new();
        messages
            .iter()
            .for_each(|m| tokenizer::strings(m, &mut contents));
        let guard = tokenizer::Guard::new(&self.tokenizer, &contents);
        let messages: Vec<Value> = messages.iter().map(|m| guard.hide_in(m)).collect();
        let whole = self.template.render(&messages, false)?;
        let mut spans = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if message.get("role").and_then(Value::as_str) != Some("assistant") {
                continue;
            }
            let before = self.template.render(&messages[..i], true)?;
            let after = self.template.render(&messages[..=i], false)?;
            if !(after.starts_with(&before) && whole.starts_with(&after)) {
                return Err(ChatError::Template(format!(
                    "message {i} is written differently when other messages follow it"
                )));
            }
            spans.push(before.len()..after.len());
        }
        let end = self.end_of_turn();
        let mut ids = Vec::new();
        let mut mask = Vec::new();
        let mut ended = None;
        for (id, at) in self.tokenizer.encode_offsets(&whole, &guard) {
            let span = spans.iter().position(|span| span.contains(&at));
            // White space that the template puts after the end of a turn is not the assistant's.
            mask.push(span.is_some() && span != ended);
            if span.is_some() && id == end {
                ended = span;
            }
            ids.push(id);
        }
        Ok((ids, mask))
    }

    /// Compiles a grammar for one answer. The last few grammars are kept, so that a host whose tools stay the same pays once.
    ///
    /// # Errors
    /// [`ChatError::Grammar`] in the compiler's words.
    pub fn grammar(&self, lark: &str) -> Result<Grammar, ChatError> {
        self.grammars.start(lark)
    }

    /// Tokens of a text without special tokens: what a view counts with.
    pub fn count(&self, text: &str, memo: &Memo) -> usize {
        memo.with(&self.tokenizer, text, <[u32]>::len)
    }

    /// SHA-256 (hex) over tokenizer, template and end of turn.
    pub fn digest(&self) -> String {
        self.digest.clone()
    }
}

/// One training or evaluation sample: the prompt's tokens before an agent's step, and the tokens of what the step says
/// (empty without a `target`). `memo` is the episode's.
///
/// # Errors
/// The view's if the prompt cannot be made short enough, the calls' if the step has no compact form.
pub fn render_sample(
    chat: &Chat,
    view: &View,
    calls: &CallFormat,
    task: &Task,
    steps_before: &[Step],
    target: Option<&Step>,
    memo: &Memo,
) -> Result<(Vec<u32>, Vec<u32>), ChatError> {
    let prompt = view.render(task, steps_before, calls, &|text| chat.count(text, memo))?;
    let reply = match target {
        Some(step) => chat.reply_ids(&calls.print_reply(step)?),
        None => Vec::new(),
    };
    Ok((chat.prompt_ids_with(&prompt, memo)?, reply))
}

fn turn(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

fn tail(text: &str, chars: usize) -> String {
    text.chars()
        .skip(text.chars().count().saturating_sub(chars))
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests;
