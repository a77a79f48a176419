//! The Lark grammar of a reply, in llguidance's dialect.

use std::fmt::Write;

use serde_json::{json, Value};

use super::notation;
use super::schema::Kind;
use super::{Shape, Tool, TEXT_PREFIX};

/// What a reply may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GrammarOptions {
    /// Plain text is allowed instead of calls.
    pub allow_text: bool,
    /// Most calls in one reply; at least 1.
    pub max_calls: usize,
    /// At least one call must be made, whatever `allow_text` says.
    pub require_call: bool,
}

impl Default for GrammarOptions {
    /// Exactly one call, no text.
    fn default() -> Self {
        Self {
            allow_text: false,
            max_calls: 1,
            require_call: true,
        }
    }
}

/// Writes the grammar of a reply that may call `tools`.
pub fn lark(tools: &[Tool], text: bool, max_calls: usize) -> String {
    let mut out = String::new();
    let calls = match (tools.len(), max_calls) {
        (0, _) | (_, 0) => None,
        (_, 1) => Some("call".to_string()),
        (_, n) => Some(format!("call (\"\\n\" call){{0,{}}}", n - 1)),
    };
    let start: Vec<String> = calls
        .into_iter()
        .chain(text.then(|| "text".to_string()))
        .collect();
    let _ = writeln!(out, "start: {}", start.join(" | "));
    if text {
        let _ = writeln!(out, "text: {} TEXT\nTEXT: /(?s:.+)/", literal(TEXT_PREFIX));
    }
    if tools.is_empty() || max_calls == 0 {
        return out;
    }
    let names: Vec<String> = (0..tools.len()).map(|t| format!("tool{t}")).collect();
    let _ = writeln!(out, "call: {}", names.join(" | "));
    for (t, tool) in tools.iter().enumerate() {
        let name = &tool.spec.name;
        match &tool.shape {
            Shape::Nothing => {
                let _ = writeln!(out, "tool{t}: {}", literal(&format!("{name}()")));
            }
            Shape::Whole(kind) => {
                let _ = writeln!(
                    out,
                    "tool{t}: {} ({}) \")\"",
                    literal(&format!("{name}(")),
                    value(kind)
                );
            }
            Shape::One(param) => {
                let _ = writeln!(
                    out,
                    "tool{t}: {} ({}) \")\"",
                    literal(&format!("{name}(")),
                    value(&param.kind)
                );
            }
            Shape::Fields(params) => {
                let _ = writeln!(
                    out,
                    "tool{t}: {} tool{t}_first0 \")\"",
                    literal(&format!("{name}("))
                );
                // `first` rules have written nothing yet; `rest` rules put a comma before what they write. Two chains of
                // rules keep the grammar linear in the number of optional parameters.
                for (p, param) in params.iter().enumerate() {
                    let key = notation::key(&param.name);
                    let (last, optional) = (p + 1 == params.len(), !param.required);
                    let rest = if last {
                        String::new()
                    } else {
                        format!(" tool{t}_rest{}", p + 1)
                    };
                    let skip_first = match (optional, last) {
                        (false, _) => String::new(),
                        (true, true) => " | \"\"".into(),
                        (true, false) => format!(" | tool{t}_first{}", p + 1),
                    };
                    let skip_rest = match (optional, last) {
                        (false, _) => String::new(),
                        (true, true) => " | \"\"".into(),
                        (true, false) => format!(" | tool{t}_rest{}", p + 1),
                    };
                    let assign = |before: &str| literal(&format!("{before}{key}="));
                    let _ = writeln!(out, "tool{t}_value{p}: {}", value(&param.kind));
                    let _ = writeln!(
                        out,
                        "tool{t}_first{p}: {} tool{t}_value{p}{rest}{skip_first}",
                        assign("")
                    );
                    if p > 0 {
                        let _ = writeln!(
                            out,
                            "tool{t}_rest{p}: {} tool{t}_value{p}{rest}{skip_rest}",
                            assign(", ")
                        );
                    }
                }
            }
        }
    }
    out
}

fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

fn value(kind: &Kind) -> String {
    match kind {
        Kind::Enum(values) => values
            .iter()
            .map(|v| literal(&super::print_enum(v)))
            .collect::<Vec<_>>()
            .join(" | "),
        Kind::Union(kinds) => kinds.iter().map(value).collect::<Vec<_>>().join(" | "),
        Kind::Json(schema) => format!("%json {}", with_options(schema)),
    }
}

/// The schema with the compiler's options: no white space between tokens, as [`notation::json`] prints, and `oneOf`
/// taken as `anyOf`, because disjointness is checked when the reply is validated.
pub fn with_options(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Some(object) = schema.as_object_mut() {
        object.insert(
            "x-guidance".into(),
            json!({ "whitespace_flexible": false, "coerce_one_of": true }),
        );
    }
    schema
}

/// Asks the grammar compiler whether it can express `schema`.
///
/// # Errors
/// The compiler's own words, first line only.
pub fn can_express(schema: &Value) -> Result<(), String> {
    use llguidance::api::{GrammarInit, ParserLimits, TopLevelGrammar, ValidationResult};
    let grammar = TopLevelGrammar::from_lark(format!("start: %json {}", with_options(schema)));
    let limits = ParserLimits {
        verbose_errors: false,
        ..ParserLimits::default()
    };
    // The compiler asserts in places; a strange schema must not take the host down.
    let result = llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| {
        match GrammarInit::Serialized(grammar).validate(None, limits) {
            ValidationResult::Error(message) => Ok(Err(message)),
            _ => Ok(Ok(())),
        }
    }));
    // Its first line, and the one that says what is wrong where lines that draw the place stand between.
    let one_line = |message: String| {
        let first = message.lines().next().unwrap_or("no reason given").trim();
        match message
            .lines()
            .find_map(|l| l.trim().strip_prefix("error: "))
        {
            Some(what) => format!("{first} {what}"),
            None => first.to_string(),
        }
    };
    result
        .unwrap_or_else(|e| Err(e.to_string()))
        .map_err(one_line)
}
