//! Tool calls in the compact notation that the student speaks: `act(left)`, `send(to=bob, body="hi")`, `text: Hello`.
//!
//! A [`CallFormat`] is compiled from the tool specifications of a request. It prints calls, reads them back, checks them
//! against their schemas and writes the grammar under which the student decodes. A JSON tool call costs 34 to 37 tokens,
//! this form six or seven.

mod grammar;
mod notation;
mod schema;

use std::collections::HashMap;

use serde_json::{Map, Value};

pub use grammar::GrammarOptions;
use notation::{Reader, Unread};
use schema::Kind;

use crate::episode::{Step, ToolCall, ToolSpec};
use crate::limits::{MAX_CALLS, MAX_JSON_DEPTH, MAX_NAME_BYTES, MAX_TOOLS, MAX_TOOL_SPEC_BYTES};

/// What stands before a reply in plain text.
pub const TEXT_PREFIX: &str = "text: ";

/// Why tools cannot be compiled, or a call cannot be printed, read or accepted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    #[error("{found} tools are more than the {limit} that one request may have")]
    TooManyTools { found: usize, limit: usize },
    #[error("tool {tool:?}: the name cannot be written in a call; letters, digits and _ - . : / are expected, {MAX_NAME_BYTES} bytes at most")]
    BadName { tool: String },
    #[error("tool {tool:?} is specified twice")]
    DuplicateTool { tool: String },
    /// The schema asks for something that no grammar can be made of.
    #[error("tool {tool:?}, {field}: {problem}")]
    CannotExpress {
        tool: String,
        field: String,
        problem: String,
    },
    #[error("a call of {tool:?}, which is not among the tools: {known}")]
    UnknownTool { tool: String, known: String },
    #[error("call of {tool:?}: the arguments are not a JSON object")]
    NotAnObject { tool: String },
    #[error("call of {tool:?}: {field}: {problem}")]
    BadArgument {
        tool: String,
        field: String,
        problem: String,
    },
    #[error("the step makes no call and says nothing")]
    EmptyStep,
    #[error("{found} calls in one reply, {limit} at most are allowed")]
    TooManyCalls { found: usize, limit: usize },
    #[error("the reply cannot be read at byte {at}: {expected} expected, found {found:?}")]
    Unreadable {
        at: usize,
        expected: String,
        found: String,
    },
    #[error("no reply is possible: there is no tool to call and plain text is not allowed")]
    NothingAllowed,
}

/// A reply read back.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reply {
    /// Calls in order, without ids.
    pub calls: Vec<ToolCall>,
    pub text: Option<String>,
}

#[derive(Clone, Debug)]
pub(super) struct Param {
    name: String,
    required: bool,
    kind: Kind,
}

/// How the arguments of a tool are written.
#[derive(Clone, Debug)]
pub(super) enum Shape {
    /// `name()`
    Nothing,
    /// `name(value)`: there is one parameter and it is required.
    One(Param),
    /// `name(a=1, b="x")`, in the schema's order, absent ones left out.
    Fields(Vec<Param>),
    /// `name({...})`: the names of the parameters are not fixed by the schema.
    Whole(Kind),
}

#[derive(Clone, Debug)]
pub(super) struct Tool {
    spec: ToolSpec,
    shape: Shape,
}

/// The tools of a request, compiled. Cheap to use, not free to make (tens of microseconds a tool): keep it while the tools stay the same.
///
/// ```
/// use locum_core::calls::CallFormat;
/// use locum_core::episode::{ToolCall, ToolSpec};
/// let act = ToolSpec {
///     name: "act".into(),
///     parameters: serde_json::json!({
///         "type": "object",
///         "properties": { "action": { "type": "string", "enum": ["left", "right"] } },
///         "required": ["action"]
///     }),
///     ..ToolSpec::default()
/// };
/// let format = CallFormat::new(&[act])?;
/// let call = ToolCall { name: "act".into(), arguments: serde_json::json!({ "action": "left" }), ..ToolCall::default() };
/// assert_eq!(format.print(&call)?, "act(left)");
/// assert_eq!(format.parse_reply("act(left)")?.calls, [call]);
/// # Ok::<(), locum_core::calls::CallError>(())
/// ```
#[derive(Clone, Debug)]
pub struct CallFormat {
    specs: Vec<ToolSpec>,
    tools: Vec<Tool>,
    by_name: HashMap<String, usize>,
}

impl CallFormat {
    /// Compiles tool specifications. No tools is fine: then only plain text can be said.
    ///
    /// # Errors
    /// A sentence naming the tool and the field that cannot be expressed: a name with spaces or parentheses, two tools of
    /// one name, more than [`MAX_TOOLS`], a schema nested deeper than [`MAX_JSON_DEPTH`] or larger than
    /// [`MAX_TOOL_SPEC_BYTES`], a `$ref` that leaves the tool, a keyword that the grammar compiler does not know.
    pub fn new(tools: &[ToolSpec]) -> Result<CallFormat, CallError> {
        if tools.len() > MAX_TOOLS {
            return Err(CallError::TooManyTools {
                found: tools.len(),
                limit: MAX_TOOLS,
            });
        }
        let mut by_name = HashMap::new();
        let mut compiled = Vec::with_capacity(tools.len());
        for (i, spec) in tools.iter().enumerate() {
            let writable = |b: u8| b.is_ascii_alphanumeric() || b"_-.:/".contains(&b);
            if spec.name.is_empty()
                || spec.name.len() > MAX_NAME_BYTES
                || !spec.name.bytes().all(writable)
            {
                return Err(CallError::BadName {
                    tool: spec.name.chars().take(100).collect(),
                });
            }
            if by_name.insert(spec.name.clone(), i).is_some() {
                return Err(CallError::DuplicateTool {
                    tool: spec.name.clone(),
                });
            }
            compiled.push(Tool {
                shape: shape(spec)?,
                spec: spec.clone(),
            });
        }
        Ok(CallFormat {
            specs: tools.to_vec(),
            tools: compiled,
            by_name,
        })
    }

    /// The specifications it was made from, in their order.
    pub fn tools(&self) -> &[ToolSpec] {
        &self.specs
    }

    /// `act(action)`; optional parameters carry a question mark.
    ///
    /// # Panics
    /// If `tool` is not an index into [`CallFormat::tools`].
    pub fn signature(&self, tool: usize) -> String {
        let Tool { spec, shape } = &self.tools[tool];
        let params = match shape {
            Shape::Nothing => String::new(),
            Shape::One(param) => param.name.clone(),
            Shape::Whole(_) => "{...}".into(),
            Shape::Fields(params) => params
                .iter()
                .map(|p| format!("{}{}", p.name, if p.required { "" } else { "?" }))
                .collect::<Vec<_>>()
                .join(", "),
        };
        format!("{}({params})", spec.name)
    }

    /// The call in its one canonical form. Values are not held against the schema (see [`CallFormat::validate`]).
    ///
    /// # Errors
    /// An unknown tool, arguments that are no object, a required parameter that is missing, a parameter that the tool
    /// does not have.
    pub fn print(&self, call: &ToolCall) -> Result<String, CallError> {
        let tool = self.tool(&call.name)?;
        let Some(arguments) = call.arguments.as_object() else {
            return Err(CallError::NotAnObject {
                tool: call.name.clone(),
            });
        };
        let values = tool.fields(arguments)?;
        let inside = match &tool.shape {
            Shape::Fields(_) => values
                .iter()
                .map(|(name, text)| format!("{}={text}", notation::key(name)))
                .collect::<Vec<_>>()
                .join(", "),
            _ => values.into_iter().map(|(_, text)| text).collect(),
        };
        Ok(format!("{}({inside})", call.name))
    }

    /// The values of the call's arguments alone, a space between them: `left`. Never fails: a call that cannot be printed
    /// canonically shows its arguments as JSON.
    pub fn print_values(&self, call: &ToolCall) -> String {
        let values = self.tool(&call.name).ok().zip(call.arguments.as_object());
        match values.and_then(|(tool, arguments)| tool.fields(arguments).ok()) {
            Some(values) if !values.is_empty() => values
                .into_iter()
                .map(|(_, text)| text)
                .collect::<Vec<_>>()
                .join(" "),
            Some(_) => call.name.clone(),
            None => notation::json(&call.arguments),
        }
    }

    /// What the student should say for an agent's step: its calls, a line each, or `text: ...` if it makes none.
    ///
    /// # Errors
    /// As [`CallFormat::print`]; [`CallError::EmptyStep`] for a step without calls and text.
    pub fn print_reply(&self, step: &Step) -> Result<String, CallError> {
        if !step.tool_calls.is_empty() {
            if step.tool_calls.len() > MAX_CALLS {
                return Err(CallError::TooManyCalls {
                    found: step.tool_calls.len(),
                    limit: MAX_CALLS,
                });
            }
            let calls: Result<Vec<_>, _> = step.tool_calls.iter().map(|c| self.print(c)).collect();
            return Ok(calls?.join("\n"));
        }
        match step.message.as_ref().map(|m| m.text()) {
            Some(text) if !text.is_empty() => Ok(format!("{TEXT_PREFIX}{text}")),
            _ => Err(CallError::EmptyStep),
        }
    }

    /// Reads a reply: calls, a line each, or `text: ...`. The calls' ids are empty. Values are not held against the
    /// schema (see [`CallFormat::validate`]).
    ///
    /// # Errors
    /// The byte where reading stopped and what was expected there; an unknown tool.
    pub fn parse_reply(&self, text: &str) -> Result<Reply, CallError> {
        if let Some(said) = text.strip_prefix(TEXT_PREFIX) {
            return Ok(Reply {
                calls: Vec::new(),
                text: Some(said.to_string()),
            });
        }
        let mut reader = Reader::new(text, 0);
        let mut calls = Vec::new();
        loop {
            calls.push(self.read_call(&mut reader)?);
            if reader.is_at_end() {
                return Ok(Reply { calls, text: None });
            }
            if calls.len() == MAX_CALLS {
                return Err(CallError::TooManyCalls {
                    found: MAX_CALLS + 1,
                    limit: MAX_CALLS,
                });
            }
            reader.expect("\n").map_err(|e| unreadable(&reader, e))?;
        }
    }

    /// Whether the call satisfies its tool's schema: names, types, enums, nested values.
    ///
    /// # Errors
    /// Names the field and says what was expected and found.
    pub fn validate(&self, call: &ToolCall) -> Result<(), CallError> {
        let tool = self.tool(&call.name)?;
        if !call.arguments.is_object() {
            return Err(CallError::NotAnObject {
                tool: call.name.clone(),
            });
        }
        if schema::depth(&call.arguments) > MAX_JSON_DEPTH {
            return Err(bad_argument(
                tool,
                "arguments",
                format!("nested deeper than {MAX_JSON_DEPTH}"),
            ));
        }
        let parameters = &tool.spec.parameters;
        if parameters.is_object() {
            schema::check(&call.arguments, parameters, parameters, "").map_err(|m| {
                bad_argument(
                    tool,
                    if m.path.is_empty() {
                        "arguments"
                    } else {
                        &m.path
                    },
                    m.problem,
                )
            })?;
        }
        // JSON Schema lets undeclared fields pass; the notation has no place for them.
        tool.fields(call.arguments.as_object().unwrap_or(&Map::new()))
            .map(|_| ())
    }

    /// The grammar of a reply, in llguidance's Lark dialect. Grammars never admit a special token but the end.
    ///
    /// # Errors
    /// [`CallError::NothingAllowed`] if neither a call nor text is possible.
    pub fn lark(&self, options: GrammarOptions) -> Result<String, CallError> {
        let text = options.allow_text && !options.require_call;
        let max_calls = options.max_calls.min(MAX_CALLS);
        if !text && (self.tools.is_empty() || max_calls == 0) {
            return Err(CallError::NothingAllowed);
        }
        Ok(grammar::lark(&self.tools, text, max_calls))
    }

    fn tool(&self, name: &str) -> Result<&Tool, CallError> {
        self.by_name
            .get(name)
            .map(|i| &self.tools[*i])
            .ok_or_else(|| {
                let mut known: Vec<&str> = self
                    .tools
                    .iter()
                    .take(20)
                    .map(|t| t.spec.name.as_str())
                    .collect();
                if self.tools.len() > known.len() {
                    known.push("...");
                }
                let known = if known.is_empty() {
                    "there are none".into()
                } else {
                    known.join(", ")
                };
                CallError::UnknownTool {
                    tool: name.chars().take(100).collect(),
                    known,
                }
            })
    }

    fn read_call(&self, reader: &mut Reader) -> Result<ToolCall, CallError> {
        let start = reader.at();
        let name = reader.run(|c| c.is_ascii_alphanumeric() || "_-.:/".contains(c));
        if name.is_empty() || !reader.rest().starts_with('(') {
            let e = Unread {
                at: start,
                expected: format!("a call or `{TEXT_PREFIX}`"),
            };
            return Err(unreadable(reader, e));
        }
        let tool = self.tool(name)?;
        let arguments = read_arguments(tool, reader).map_err(|e| unreadable(reader, e))?;
        Ok(ToolCall {
            name: name.to_string(),
            arguments: Value::Object(arguments),
            ..ToolCall::default()
        })
    }
}

/// Canonical equality of calls: the same names in the same order, with the same arguments as JSON values. The order of
/// an object's fields and the ids do not matter; 1 equals 1.0.
pub fn same_calls(a: &[ToolCall], b: &[ToolCall]) -> bool {
    a.len() == b.len()
        && a.iter()
            .zip(b)
            .all(|(a, b)| a.name == b.name && same_value(&a.arguments, &b.arguments))
}

fn same_value(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => {
            a == b || ((a.is_f64() || b.is_f64()) && a.as_f64() == b.as_f64())
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_value(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len()
                && a.iter()
                    .all(|(k, v)| b.get(k).is_some_and(|w| same_value(v, w)))
        }
        _ => a == b,
    }
}

impl Tool {
    /// The arguments in the order they are written, each with its name and its text.
    fn fields<'a>(
        &'a self,
        arguments: &'a Map<String, Value>,
    ) -> Result<Vec<(&'a str, String)>, CallError> {
        let root = &self.spec.parameters;
        let params: &[Param] = match &self.shape {
            Shape::Nothing => &[],
            Shape::One(param) => std::slice::from_ref(param),
            Shape::Fields(params) => params,
            Shape::Whole(_) => {
                let value = schema::canonical(&Value::Object(arguments.clone()), root, root);
                return Ok(vec![("", notation::json(&value))]);
            }
        };
        if let Some(name) = arguments
            .keys()
            .find(|k| !params.iter().any(|p| p.name == **k))
        {
            return Err(bad_argument(self, name, "the tool has no such parameter"));
        }
        let mut out = Vec::with_capacity(arguments.len());
        for param in params {
            match arguments.get(&param.name) {
                Some(value) => {
                    let value = match root.get("properties").and_then(|p| p.get(&param.name)) {
                        Some(schema) => schema::canonical(value, schema, root),
                        None => value.clone(),
                    };
                    out.push((param.name.as_str(), print_value(&value, &param.kind)));
                }
                None if param.required => {
                    return Err(bad_argument(self, &param.name, "required, but missing"))
                }
                None => {}
            }
        }
        Ok(out)
    }
}

fn bad_argument(tool: &Tool, field: &str, problem: impl Into<String>) -> CallError {
    CallError::BadArgument {
        tool: tool.spec.name.clone(),
        field: field.into(),
        problem: problem.into(),
    }
}

fn unreadable(reader: &Reader, e: Unread) -> CallError {
    CallError::Unreadable {
        expected: e.expected,
        found: reader.text()[e.at..].chars().take(24).collect(),
        at: e.at,
    }
}

/// Compiles the parameters of one tool.
fn shape(spec: &ToolSpec) -> Result<Shape, CallError> {
    let problem_with = |field: &str, problem: String| CallError::CannotExpress {
        tool: spec.name.clone(),
        field: field.into(),
        problem,
    };
    let fail = |field: &str, problem: String| Err(problem_with(field, problem));
    let root = &spec.parameters;
    let object = match root {
        Value::Null => return Ok(Shape::Nothing),
        Value::Object(object) => object,
        _ => return fail("parameters", "a JSON schema object is expected".into()),
    };
    if schema::depth(root) > MAX_JSON_DEPTH {
        return fail(
            "parameters",
            format!("the schema is nested deeper than {MAX_JSON_DEPTH}"),
        );
    }
    let bytes = root.to_string().len();
    if bytes > MAX_TOOL_SPEC_BYTES {
        return fail(
            "parameters",
            format!("the schema has {bytes} bytes, {MAX_TOOL_SPEC_BYTES} are allowed"),
        );
    }
    match object.get("type") {
        None => {}
        Some(Value::String(name)) if name == "object" => {}
        Some(other) => {
            return fail(
                "parameters",
                format!("`type` must be \"object\", found {other}"),
            )
        }
    }
    let compile = |field: &str, schema: &Value| -> Result<Kind, CallError> {
        let kind = schema::kind(schema, root).map_err(|problem| problem_with(field, problem))?;
        expressible(&kind).map_err(|problem| problem_with(field, problem))?;
        Ok(kind)
    };
    let open = match object.get("additionalProperties") {
        None | Some(Value::Bool(false)) => false,
        Some(_) => true,
    };
    let composed = ["anyOf", "oneOf", "allOf", "$ref", "patternProperties"]
        .iter()
        .any(|k| object.contains_key(*k));
    if open || composed {
        let mut whole = object.clone();
        // The schema may say no more than "one of these"; arguments are an object all the same.
        if !composed {
            whole.insert("type".into(), "object".into());
        }
        return Ok(Shape::Whole(compile("parameters", &Value::Object(whole))?));
    }
    let empty = Map::new();
    let properties = match object.get("properties") {
        None | Some(Value::Null) => &empty,
        Some(Value::Object(properties)) => properties,
        Some(_) => return fail("properties", "an object is expected".into()),
    };
    let mut required = Vec::new();
    for name in object
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        match name.as_str() {
            Some(name) if properties.contains_key(name) => required.push(name),
            Some(name) => return fail(name, "required, but not among the properties".into()),
            None => return fail("required", "a list of names is expected".into()),
        }
    }
    let params: Vec<Param> = properties
        .iter()
        .map(|(name, schema)| {
            let required = required.contains(&name.as_str());
            Ok(Param {
                name: name.clone(),
                required,
                kind: compile(name, schema)?,
            })
        })
        .collect::<Result<_, CallError>>()?;
    Ok(match <[Param; 1]>::try_from(params) {
        Ok([param]) if param.required => Shape::One(param),
        Ok([param]) => Shape::Fields(vec![param]),
        Err(params) if params.is_empty() => Shape::Nothing,
        Err(params) => Shape::Fields(params),
    })
}

/// Asks the grammar compiler about every schema that is not plainly one of its own.
fn expressible(kind: &Kind) -> Result<(), String> {
    match kind {
        Kind::Enum(_) => Ok(()),
        Kind::Union(kinds) => kinds.iter().try_for_each(expressible),
        Kind::Json(schema) => {
            let plain = schema.as_object().is_some_and(|o| {
                o.is_empty()
                    || (o.len() == 1
                        && ["string", "integer", "number", "boolean", "null"]
                            .iter()
                            .any(|t| o.get("type") == Some(&(*t).into())))
            });
            if plain {
                Ok(())
            } else {
                grammar::can_express(schema)
            }
        }
    }
}

fn print_enum(value: &Value) -> String {
    match value {
        Value::String(word) if notation::is_bare(word) => word.clone(),
        _ => notation::json(value),
    }
}

fn print_value(value: &Value, kind: &Kind) -> String {
    let mut kinds = vec![kind];
    while let Some(kind) = kinds.pop() {
        match kind {
            Kind::Enum(values) => {
                // The enum's own spelling: 1.0 is printed as the 1 that the schema lists.
                if let Some(listed) = values.iter().find(|v| same_value(v, value)) {
                    return print_enum(listed);
                }
            }
            Kind::Union(inner) => kinds.extend(inner),
            Kind::Json(_) => {}
        }
    }
    notation::json(value)
}

/// Reads `(...)` after the tool's name.
fn read_arguments(tool: &Tool, reader: &mut Reader) -> Result<Map<String, Value>, Unread> {
    let mut out = Map::new();
    reader.expect("(")?;
    match &tool.shape {
        Shape::Nothing => {}
        Shape::One(param) => {
            out.insert(param.name.clone(), reader.value()?);
        }
        Shape::Whole(_) => match reader.value()? {
            Value::Object(object) => out = object,
            _ => return reader.fail("a JSON object"),
        },
        Shape::Fields(params) => {
            while !reader.rest().starts_with(')') {
                if !out.is_empty() {
                    reader.expect(",")?;
                    reader.skip_spaces();
                }
                let start = reader.at();
                let name = reader.key()?;
                if !params.iter().any(|p| p.name == name) || out.contains_key(&name) {
                    let left: Vec<_> = params
                        .iter()
                        .filter(|p| !out.contains_key(&p.name))
                        .map(|p| p.name.as_str())
                        .collect();
                    return Err(Unread {
                        at: start,
                        expected: format!("one of the parameters {}", left.join(", ")),
                    });
                }
                reader.expect("=")?;
                out.insert(name, reader.value()?);
            }
        }
    }
    reader.expect(")")?;
    Ok(out)
}

#[cfg(test)]
mod tests;
