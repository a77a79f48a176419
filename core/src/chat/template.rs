//! The chat template: Hugging Face's Jinja, rendered as transformers renders it.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{context, Environment, Error, ErrorKind, State};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{hex, ChatError};
use crate::limits::MAX_EPISODE_BYTES;

/// Largest template source, in bytes.
const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// Instructions that one rendering may take: 0.9 s of empty loops.
const MAX_FUEL: u64 = 20_000_000;
/// Largest text that one rendering may write: twice what an episode may hold, for what JSON escapes.
const MAX_RENDERED_BYTES: usize = 2 * MAX_EPISODE_BYTES;
/// Widest indentation of JSON in a template.
const MAX_INDENT: usize = 16;
const NAME: &str = "chat_template";

/// A compiled chat template. `enable_thinking` is always false: a student answers with a call, not with reasoning.
pub struct Template {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
    digest: String,
}

impl Template {
    /// Compiles a template; `bos` and `eos` are the names of the tokenizer's special tokens, empty if it has none.
    ///
    /// The clock is not given to templates: `strftime_now` is undefined, and one that insists on it is refused when it renders.
    ///
    /// # Errors
    /// [`ChatError::Template`] with the line that is wrong.
    pub fn from_source(source: &str, bos: &str, eos: &str) -> Result<Template, ChatError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(ChatError::Template(format!(
                "the source has {} bytes, {MAX_TEMPLATE_BYTES} are allowed",
                source.len()
            )));
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(MAX_FUEL));
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<String, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_filter("tojson", to_json);
        environment.set_unknown_method_callback(python_method);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|e| ChatError::Template(sentence(&e)))?;
        let digest = hex(&Sha256::digest(format!("{bos}\n{eos}\n{source}")));
        Ok(Template {
            environment,
            source: source.into(),
            bos: bos.into(),
            eos: eos.into(),
            digest,
        })
    }

    /// Renders messages; with `add_generation_prompt`, up to where the assistant begins to speak.
    ///
    /// # Errors
    /// [`ChatError::Render`] with what the template said (`raise_exception`) or used that is not there.
    pub fn render(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|e| ChatError::Template(sentence(&e)))?;
        let values = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos,
            eos_token => self.eos,
            enable_thinking => false,
        };
        let mut out = Bounded(Vec::new());
        template
            .render_captured_to(values, &mut out)
            .map_err(|e| ChatError::Render(sentence(&e)))?;
        String::from_utf8(out.0).map_err(|e| ChatError::Render(e.to_string()))
    }

    /// Name of the token that begins a text; empty if there is none.
    pub fn bos(&self) -> &str {
        &self.bos
    }

    /// Name of the token that ends a text; empty if there is none.
    pub fn eos(&self) -> &str {
        &self.eos
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    /// SHA-256 (hex) over the source and the names of its tokens.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

/// What a rendering has written, up to [`MAX_RENDERED_BYTES`].
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED_BYTES {
            let why = format!("it writes more than {MAX_RENDERED_BYTES} bytes");
            return Err(std::io::Error::other(why));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An error with its causes, one line.
fn sentence(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// `{% generation %}` marks what the assistant says for transformers' own mask; here spans are found by rendering, so the
/// tags become blocks that do nothing and strip white space in the same way.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start + 2..].find("%}") else {
            break;
        };
        let tag = &rest[start..start + length + 4];
        let inner = &tag[2..tag.len() - 2];
        let word = inner.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        out.push_str(&rest[..start]);
        match word {
            "generation" => out.push_str(&tag.replacen(word, "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen(word, "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = &rest[start + tag.len()..];
    }
    out.push_str(rest);
    out
}

/// Python's `json.dumps(value, ensure_ascii=False)`, which transformers puts in the place of Jinja's own filter.
fn to_json(value: minijinja::Value, options: Kwargs) -> Result<minijinja::Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    if indent > Some(MAX_INDENT) {
        let message = format!("tojson indents by {MAX_INDENT} at most");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    let _: Option<bool> = options.get("ensure_ascii")?;
    let _: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let value = serde_json::to_value(&value)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let mut out = String::new();
    dump(&value, indent, 0, &mut out);
    Ok(minijinja::Value::from_safe_string(out))
}

fn dump(value: &Value, indent: Option<usize>, level: usize, out: &mut String) {
    let line = |out: &mut String, level: usize| {
        if let Some(width) = indent {
            out.push('\n');
            out.push_str(&" ".repeat(width * level));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match value {
        Value::Array(list) if !list.is_empty() => {
            out.push('[');
            for (i, item) in list.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { separator });
                line(out, level + 1);
                dump(item, indent, level + 1, out);
            }
            line(out, level);
            out.push(']');
        }
        Value::Object(map) if !map.is_empty() => {
            out.push('{');
            for (i, (key, item)) in map.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { separator });
                line(out, level + 1);
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push_str(": ");
                dump(item, indent, level + 1, out);
            }
            line(out, level);
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
}

/// The methods of Python's strings and dictionaries that chat templates use.
fn python_method(
    _: &State,
    value: &minijinja::Value,
    method: &str,
    args: &[minijinja::Value],
) -> Result<minijinja::Value, Error> {
    let unknown = || {
        Error::new(
            ErrorKind::UnknownMethod,
            format!("{} has no method {method}", value.kind()),
        )
    };
    let text_arg = |i: usize| args.get(i).and_then(|a| a.as_str());
    match value.kind() {
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let strip = |left: bool, right: bool| {
                let set = text_arg(0);
                let drop = |c: char| set.map_or(c.is_whitespace(), |set| set.contains(c));
                let text = if left {
                    text.trim_start_matches(drop)
                } else {
                    text
                };
                if right {
                    text.trim_end_matches(drop)
                } else {
                    text
                }
                .to_string()
            };
            let any = |test: &dyn Fn(&str) -> bool| match args.first() {
                Some(list) if list.kind() == ValueKind::Seq => list
                    .try_iter()
                    .is_ok_and(|mut items| items.any(|item| item.as_str().is_some_and(test))),
                _ => text_arg(0).is_some_and(test),
            };
            Ok(match method {
                "strip" => strip(true, true).into(),
                "lstrip" => strip(true, false).into(),
                "rstrip" => strip(false, true).into(),
                "upper" => text.to_uppercase().into(),
                "lower" => text.to_lowercase().into(),
                "startswith" => any(&|p| text.starts_with(p)).into(),
                "endswith" => any(&|p| text.ends_with(p)).into(),
                "find" => match text_arg(0).and_then(|p| text.find(p)) {
                    Some(at) => (text[..at].chars().count() as i64).into(),
                    None => (-1i64).into(),
                },
                "count" => text_arg(0)
                    .filter(|p| !p.is_empty())
                    .map_or(0, |p| text.matches(p).count())
                    .into(),
                "replace" => match (text_arg(0), text_arg(1)) {
                    (Some(from), Some(to)) => text.replace(from, to).into(),
                    _ => return Err(unknown()),
                },
                "split" => {
                    let parts: Vec<&str> = match (text_arg(0), args.get(1).and_then(|n| n.as_i64()))
                    {
                        (None, _) => text.split_whitespace().collect(),
                        (Some(by), Some(n)) if n >= 0 => text.splitn(n as usize + 1, by).collect(),
                        (Some(by), _) => text.split(by).collect(),
                    };
                    parts
                        .into_iter()
                        .map(minijinja::Value::from)
                        .collect::<Vec<_>>()
                        .into()
                }
                "join" => {
                    let parts: Vec<String> = args
                        .first()
                        .ok_or_else(unknown)?
                        .try_iter()?
                        .map(|part| part.to_string())
                        .collect();
                    parts.join(text).into()
                }
                _ => return Err(unknown()),
            })
        }
        ValueKind::Map => {
            let keys =
                || -> Result<Vec<minijinja::Value>, Error> { Ok(value.try_iter()?.collect()) };
            match method {
                "keys" => Ok(keys()?.into()),
                "values" => keys()?
                    .iter()
                    .map(|k| value.get_item(k))
                    .collect::<Result<Vec<_>, _>>()
                    .map(Into::into),
                "items" => keys()?
                    .iter()
                    .map(|k| Ok(minijinja::Value::from(vec![k.clone(), value.get_item(k)?])))
                    .collect::<Result<Vec<_>, Error>>()
                    .map(Into::into),
                "get" => {
                    let (key, default): (minijinja::Value, Rest<minijinja::Value>) =
                        minijinja::value::from_args(args)?;
                    let found = value.get_item(&key)?;
                    if found.is_undefined() {
                        return Ok(default.first().cloned().unwrap_or_else(|| ().into()));
                    }
                    Ok(found)
                }
                _ => Err(unknown()),
            }
        }
        _ => Err(unknown()),
    }
}
