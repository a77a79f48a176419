//! OpenAI chat messages to steps, and back to equal messages.
//!
//! What a [`Step`] has no field for is kept in its `extra`: unknown fields under their own name, and
//! under [`RESERVED`] the few facts that make the way back exact (an absent content is not a null
//! one). Names that begin with `@` are ours and never printed.

use std::borrow::BorrowMut;

use serde_json::{json, Map, Value};

use crate::episode::{Content, Label, Observation, Source, Step, ToolCall, ToolSpec};
use crate::formats::FormatError;
use crate::limits::{MAX_JSON_DEPTH, MAX_TOOLS};
use crate::store::json;

/// Key of `extra` that holds what the way back to messages needs.
pub const RESERVED: &str = "@locum";

/// What one chat message is.
// Taken apart at once by whoever asked, so the size of the larger variant does not add up.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// A turn of its own; its index is still 0.
    Step(Step),
    /// The result of a tool call, which belongs to the step that made the call.
    Observation(Observation),
}

/// Turns OpenAI chat messages into steps, numbered from 1.
///
/// A `tool` message becomes an observation of the latest step that made the call; one whose call is
/// nowhere belongs to the latest agent step, and before any agent step to an empty system step made
/// for it. Every step is [`Actor::Unknown`](crate::episode::Actor::Unknown): the caller knows who spoke.
///
/// # Errors
/// [`FormatError::Message`] with the index of the first message that cannot be recorded.
pub fn steps_from_messages(messages: &[Value]) -> Result<Vec<Step>, FormatError> {
    let mut steps: Vec<Step> = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        match piece_from_message(message)
            .map_err(|problem| FormatError::Message { index, problem })?
        {
            Piece::Step(mut step) => {
                step.index = steps.len() as u32 + 1;
                steps.push(step);
            }
            Piece::Observation(observation) => {
                attach(&mut steps, observation);
            }
        }
    }
    Ok(steps)
}

/// Gives an observation to the step it belongs to, and says which one that is (counted from 1).
///
/// May add an empty system step first: see [`steps_from_messages`]. The steps may be [outlines](outline).
pub fn attach<S>(steps: &mut Vec<S>, mut observation: Observation) -> u32
where
    S: BorrowMut<Step> + From<Step>,
{
    let made = |step: &Step, id: &str| step.tool_calls.iter().any(|call| call.id == id);
    let open = |step: &Step, id: &str| {
        !step
            .observations
            .iter()
            .any(|o| o.call_id.as_deref() == Some(id))
    };
    let latest = |is_it: &dyn Fn(&Step) -> bool| steps.iter().rposition(|s| is_it(s.borrow()));
    let id = observation.call_id.as_deref();
    let owner = id
        .and_then(|id| {
            // Some hosts use the same ids again in every turn, so the latest unanswered call is meant.
            latest(&|s| made(s, id) && open(s, id)).or_else(|| latest(&|s| made(s, id)))
        })
        .or_else(|| latest(&|step| step.source == Source::Agent || is_placeholder(step)));
    let owner = owner.unwrap_or_else(|| {
        let mut step = Step {
            index: steps.len() as u32 + 1,
            source: Source::System,
            ..Step::default()
        };
        step.extra
            .insert(RESERVED.into(), json!({"placeholder": true}));
        steps.push(step.into());
        steps.len() - 1
    });
    let last = steps.len() - 1;
    if owner != last {
        let moved: Vec<Moved> = steps.iter().flat_map(|s| moved_from(s.borrow())).collect();
        let last: &Step = steps[last].borrow();
        let place = printed_after(last, &moved).len();
        let after = json!({"step": last.index, "place": place});
        reserve(&mut observation.extra, "after", after);
    }
    let owner: &mut Step = steps[owner].borrow_mut();
    owner.observations.push(observation);
    owner.index
}

/// Of a step and of an observation what [`attach`] looks at, without what they say.
pub fn outline(step: &Step) -> Step {
    let id_of = |call: &ToolCall| ToolCall {
        id: call.id.clone(),
        ..ToolCall::default()
    };
    Step {
        index: step.index,
        source: step.source,
        tool_calls: step.tool_calls.iter().map(id_of).collect(),
        observations: step.observations.iter().map(outline_of).collect(),
        extra: reserved_only(&step.extra),
        ..Step::default()
    }
}

/// See [`outline`].
pub fn outline_of(observation: &Observation) -> Observation {
    Observation {
        call_id: observation.call_id.clone(),
        extra: reserved_only(&observation.extra),
        ..Observation::default()
    }
}

fn reserved_only(extra: &Map<String, Value>) -> Map<String, Value> {
    let ours = extra.get(RESERVED).cloned();
    ours.map(|value| (RESERVED.to_string(), value))
        .into_iter()
        .collect()
}

/// Turns steps back into OpenAI chat messages: equal as JSON to those they were made from.
pub fn messages_from_steps(steps: &[Step]) -> Vec<Value> {
    let moved: Vec<Moved> = steps.iter().flat_map(moved_from).collect();
    let mut messages = Vec::with_capacity(steps.len() * 2);
    for step in steps {
        if !is_placeholder(step) {
            messages.push(message_of_step(step));
        }
        messages.extend(
            printed_after(step, &moved)
                .into_iter()
                .map(message_of_observation),
        );
    }
    messages
}

/// An observation whose message does not stand directly after the step that made the call.
struct Moved<'a> {
    /// Index of the step it stands after.
    after: u64,
    /// How many tool messages stand between.
    place: usize,
    observation: &'a Observation,
}

fn moved_from(step: &Step) -> impl Iterator<Item = Moved<'_>> {
    step.observations.iter().filter_map(|observation| {
        let after = reserved(&observation.extra, "after")?;
        let place = after.get("place")?.as_u64()? as usize;
        Some(Moved {
            after: after.get("step")?.as_u64()?,
            place,
            observation,
        })
    })
}

/// The observations whose messages stand directly after the message of `step`, in order.
fn printed_after<'a>(step: &'a Step, moved: &[Moved<'a>]) -> Vec<&'a Observation> {
    let own = step
        .observations
        .iter()
        .filter(|o| reserved(&o.extra, "after").is_none());
    let mut list: Vec<&Observation> = own.collect();
    let mut late: Vec<&Moved> = moved
        .iter()
        .filter(|moved| moved.after == u64::from(step.index))
        .collect();
    late.sort_by_key(|moved| moved.place);
    for moved in late {
        list.insert(moved.place.min(list.len()), moved.observation);
    }
    list
}

/// Reads one chat message. The error is a sentence about the message.
pub fn piece_from_message(message: &Value) -> Result<Piece, String> {
    let Value::Object(message) = message else {
        return Err(format!("an object is expected, found {}", kind(message)));
    };
    let role = match message.get("role") {
        Some(Value::String(role)) => role.as_str(),
        Some(other) => return Err(format!("`role` must be a string, found {}", kind(other))),
        None => return Err("`role` is missing".into()),
    };
    match role {
        "tool" => observation_from(message).map(Piece::Observation),
        "system" | "developer" => step_from(message, Source::System).map(Piece::Step),
        "user" => step_from(message, Source::User).map(Piece::Step),
        "assistant" => step_from(message, Source::Agent).map(Piece::Step),
        "function" => {
            Err("role `function` is the legacy form of a tool result; use role `tool` with `tool_call_id`".into())
        }
        other => Err(format!("unknown role {}", quoted(other))),
    }
}

fn step_from(message: &Map<String, Value>, source: Source) -> Result<Step, String> {
    let mut step = Step {
        source,
        ..Step::default()
    };
    let agent = source == Source::Agent;
    if !message.contains_key("content") {
        reserve(&mut step.extra, "no_content", json!(true));
    }
    for (key, value) in message {
        match key.as_str() {
            "role" => {
                if value == "developer" {
                    reserve(&mut step.extra, "role", value.clone());
                }
            }
            "content" => step.message = content_from(value)?,
            "tool_calls" if agent => match value {
                Value::Array(calls) if !calls.is_empty() => {
                    for (n, call) in calls.iter().enumerate() {
                        step.tool_calls.push(
                            call_from(call)
                                .map_err(|problem| format!("tool call {n}: {problem}"))?,
                        );
                    }
                }
                Value::Array(_) | Value::Null => {
                    reserve(&mut step.extra, "tool_calls", value.clone())
                }
                other => {
                    return Err(format!(
                        "`tool_calls` must be a list, found {}",
                        kind(other)
                    ))
                }
            },
            "function_call" if agent && !value.is_null() => {
                return Err(
                    "`function_call` is the legacy form of a tool call; use `tool_calls`".into(),
                );
            }
            "weight" if agent => {
                let weight = value
                    .as_f64()
                    .filter(|weight| *weight >= 0.0 && *weight <= f64::from(f32::MAX));
                let Some(weight) = weight else {
                    return Err("`weight` must be a number that is not negative".into());
                };
                let weight = weight as f32;
                step.label = Some(Label {
                    train: weight > 0.0,
                    weight,
                    reason: "weight of the source".into(),
                });
                reserve(&mut step.extra, "weight", value.clone());
            }
            "reasoning_content" | "reasoning"
                if agent && value.is_string() && step.reasoning.is_none() =>
            {
                step.reasoning = value.as_str().map(String::from);
                reserve(&mut step.extra, "reasoning", json!(key));
            }
            _ => keep(&mut step.extra, key, value),
        }
    }
    Ok(step)
}

fn observation_from(message: &Map<String, Value>) -> Result<Observation, String> {
    let mut observation = Observation::default();
    if !message.contains_key("content") {
        reserve(&mut observation.extra, "no_content", json!(true));
    }
    for (key, value) in message {
        match key.as_str() {
            "role" => {}
            "content" => observation.content = content_from(value)?,
            "tool_call_id" => match value {
                Value::String(id) => observation.call_id = Some(id.clone()),
                Value::Null => reserve(&mut observation.extra, "tool_call_id", Value::Null),
                other => {
                    return Err(format!(
                        "`tool_call_id` must be a string, found {}",
                        kind(other)
                    ))
                }
            },
            _ => keep(&mut observation.extra, key, value),
        }
    }
    Ok(observation)
}

fn content_from(value: &Value) -> Result<Option<Content>, String> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(Content::Text(text.clone()))),
        Value::Array(parts) => Ok(Some(Content::Parts(parts.clone()))),
        other => Err(format!(
            "`content` must be text, a list of parts or null, found {}",
            kind(other)
        )),
    }
}

fn call_from(call: &Value) -> Result<ToolCall, String> {
    let Value::Object(fields) = call else {
        return Err(format!("an object is expected, found {}", kind(call)));
    };
    let mut made = ToolCall::default();
    match fields.get("type") {
        None => reserve(&mut made.extra, "no_type", json!(true)),
        Some(Value::String(name)) if name == "function" => {}
        Some(other) => {
            return Err(format!(
                "only calls of type \"function\" are known, found {}",
                short(other)
            ))
        }
    }
    let function = match fields.get("function") {
        Some(Value::Object(function)) => function,
        _ => return Err("`function` is missing".into()),
    };
    match fields.get("id") {
        Some(Value::String(id)) => made.id = id.clone(),
        None => reserve(&mut made.extra, "no_id", json!(true)),
        Some(Value::Null) => reserve(&mut made.extra, "null_id", json!(true)),
        Some(other) => return Err(format!("`id` must be a string, found {}", kind(other))),
    }
    made.name = match function.get("name") {
        Some(Value::String(name)) if !name.is_empty() => name.clone(),
        _ => return Err("`function.name` is missing".into()),
    };
    match function.get("arguments") {
        Some(Value::String(raw)) => match json::parse(raw.as_bytes(), MAX_JSON_DEPTH) {
            Ok(arguments @ Value::Object(_)) => {
                if json::print(&arguments) != *raw {
                    made.arguments_raw = Some(raw.clone());
                }
                made.arguments = arguments;
            }
            _ => made.arguments_raw = Some(raw.clone()),
        },
        Some(object @ Value::Object(_)) => {
            made.arguments = object.clone();
            reserve(&mut made.extra, "arguments", json!("object"));
        }
        None => reserve(&mut made.extra, "arguments", json!("absent")),
        Some(other) => {
            return Err(format!(
                "`function.arguments` must be a string or an object, found {}",
                kind(other)
            ))
        }
    }
    for (key, value) in fields
        .iter()
        .filter(|(key, _)| !matches!(key.as_str(), "id" | "type" | "function"))
    {
        keep(&mut made.extra, key, value);
    }
    let more: Map<String, Value> = function
        .iter()
        .filter(|(key, _)| !matches!(key.as_str(), "name" | "arguments"))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    if !more.is_empty() {
        reserve(&mut made.extra, "function", Value::Object(more));
    }
    Ok(made)
}

fn message_of_step(step: &Step) -> Value {
    let mut message = Map::new();
    let role = match step.source {
        Source::System => reserved(&step.extra, "role")
            .and_then(Value::as_str)
            .unwrap_or("system"),
        Source::User => "user",
        Source::Agent => "assistant",
    };
    message.insert("role".into(), json!(role));
    put_content(&mut message, &step.message, &step.extra);
    if let Some(reasoning) = &step.reasoning {
        let key = reserved(&step.extra, "reasoning")
            .and_then(Value::as_str)
            .unwrap_or("reasoning_content");
        message.insert(key.into(), json!(reasoning));
    }
    if !step.tool_calls.is_empty() {
        message.insert(
            "tool_calls".into(),
            step.tool_calls.iter().map(call_to_json).collect(),
        );
    } else if let Some(value) = reserved(&step.extra, "tool_calls") {
        message.insert("tool_calls".into(), value.clone());
    }
    if let Some(value) = reserved(&step.extra, "weight") {
        message.insert("weight".into(), value.clone());
    } else if let (Some(label), Source::Agent) = (&step.label, step.source) {
        let weight = if label.train { label.weight } else { 0.0 };
        let whole = weight.fract() == 0.0 && weight.abs() < 1e9;
        message.insert(
            "weight".into(),
            if whole {
                json!(weight as i64)
            } else {
                json!(weight)
            },
        );
    }
    put_extra(&mut message, &step.extra);
    Value::Object(message)
}

fn message_of_observation(observation: &Observation) -> Value {
    let mut message = Map::new();
    message.insert("role".into(), json!("tool"));
    if let Some(id) = &observation.call_id {
        message.insert("tool_call_id".into(), json!(id));
    } else if reserved(&observation.extra, "tool_call_id").is_some() {
        message.insert("tool_call_id".into(), Value::Null);
    }
    put_content(&mut message, &observation.content, &observation.extra);
    put_extra(&mut message, &observation.extra);
    Value::Object(message)
}

fn call_to_json(call: &ToolCall) -> Value {
    let mut function = Map::new();
    function.insert("name".into(), json!(call.name));
    let arguments = match &call.arguments_raw {
        Some(raw) => Some(json!(raw)),
        None => match reserved(&call.extra, "arguments").and_then(Value::as_str) {
            Some("object") => Some(call.arguments.clone()),
            Some("absent") => None,
            _ => Some(json!(json::print(&call.arguments))),
        },
    };
    if let Some(arguments) = arguments {
        function.insert("arguments".into(), arguments);
    }
    if let Some(Value::Object(more)) = reserved(&call.extra, "function") {
        function.extend(more.clone());
    }
    let mut fields = Map::new();
    if reserved(&call.extra, "null_id").is_some() {
        fields.insert("id".into(), Value::Null);
    } else if reserved(&call.extra, "no_id").is_none() {
        fields.insert("id".into(), json!(call.id));
    }
    if reserved(&call.extra, "no_type").is_none() {
        fields.insert("type".into(), json!("function"));
    }
    fields.insert("function".into(), Value::Object(function));
    put_extra(&mut fields, &call.extra);
    Value::Object(fields)
}

fn put_content(
    message: &mut Map<String, Value>,
    content: &Option<Content>,
    extra: &Map<String, Value>,
) {
    match content {
        Some(Content::Text(text)) => message.insert("content".into(), json!(text)),
        Some(Content::Parts(parts)) => message.insert("content".into(), json!(parts)),
        None if reserved(extra, "no_content").is_some() => None,
        None => message.insert("content".into(), Value::Null),
    };
}

fn put_extra(message: &mut Map<String, Value>, extra: &Map<String, Value>) {
    for (key, value) in extra.iter().filter(|(key, _)| !key.starts_with('@')) {
        message.insert(key.clone(), value.clone());
    }
    if let Some(Value::Object(fields)) = reserved(extra, "fields") {
        message.extend(fields.clone());
    }
}

/// Keeps a field that has no place of its own; names that begin with `@` move under [`RESERVED`].
fn keep(extra: &mut Map<String, Value>, key: &str, value: &Value) {
    if !key.starts_with('@') {
        extra.insert(key.into(), value.clone());
        return;
    }
    let mut fields = match reserved(extra, "fields") {
        Some(Value::Object(fields)) => fields.clone(),
        _ => Map::new(),
    };
    fields.insert(key.into(), value.clone());
    reserve(extra, "fields", Value::Object(fields));
}

fn reserve(extra: &mut Map<String, Value>, key: &str, value: Value) {
    let entry = extra.entry(RESERVED).or_insert_with(|| json!({}));
    if !entry.is_object() {
        *entry = json!({});
    }
    entry
        .as_object_mut()
        .expect("made above")
        .insert(key.into(), value);
}

fn reserved<'a>(extra: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    extra.get(RESERVED)?.get(key)
}

fn is_placeholder(step: &Step) -> bool {
    reserved(&step.extra, "placeholder").is_some()
}

/// Reads OpenAI tool specifications (`[{"type":"function","function":{..}}]`); null and absent mean none.
///
/// # Errors
/// [`FormatError::Tool`] names the tool that is not a function, has no name or has a name twice.
pub fn tools_from_json(tools: &Value) -> Result<Vec<ToolSpec>, FormatError> {
    let list = match tools {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) => list,
        other => {
            let problem = format!("`tools` must be a list, found {}", kind(other));
            return Err(FormatError::Tool { index: 0, problem });
        }
    };
    if list.len() > MAX_TOOLS {
        let problem = format!("{} tools; at most {MAX_TOOLS} are taken", list.len());
        return Err(FormatError::Tool {
            index: MAX_TOOLS,
            problem,
        });
    }
    let mut specs: Vec<ToolSpec> = Vec::with_capacity(list.len());
    for (index, tool) in list.iter().enumerate() {
        let spec = tool_from(tool).map_err(|problem| FormatError::Tool { index, problem })?;
        if specs.iter().any(|other| other.name == spec.name) {
            return Err(FormatError::Tool {
                index,
                problem: format!("the name {:?} is used twice", spec.name),
            });
        }
        specs.push(spec);
    }
    Ok(specs)
}

fn tool_from(tool: &Value) -> Result<ToolSpec, String> {
    let Value::Object(fields) = tool else {
        return Err(format!("an object is expected, found {}", kind(tool)));
    };
    match fields.get("type") {
        Some(Value::String(name)) if name == "function" => {}
        Some(other) => {
            return Err(format!(
                "only tools of type \"function\" are known, found {}",
                short(other)
            ))
        }
        None => return Err("`type` is missing".into()),
    }
    let Some(Value::Object(function)) = fields.get("function") else {
        return Err("`function` is missing".into());
    };
    let name = match function.get("name") {
        Some(Value::String(name)) if !name.is_empty() => name.clone(),
        _ => return Err("`function.name` is missing".into()),
    };
    let mut spec = ToolSpec {
        name,
        ..ToolSpec::default()
    };
    match function.get("description") {
        Some(Value::String(text)) => {
            spec.description = text.clone();
            if text.is_empty() {
                reserve(&mut spec.extra, "description", json!(""));
            }
        }
        Some(Value::Null) => reserve(&mut spec.extra, "description", Value::Null),
        None => {}
        Some(other) => {
            return Err(format!(
                "`description` must be a string, found {}",
                kind(other)
            ))
        }
    }
    match function.get("parameters") {
        Some(parameters @ Value::Object(_)) => spec.parameters = parameters.clone(),
        Some(Value::Null) => reserve(&mut spec.extra, "parameters", Value::Null),
        None => {}
        Some(other) => {
            return Err(format!(
                "`parameters` must be a JSON schema, found {}",
                kind(other)
            ))
        }
    }
    for (key, value) in function
        .iter()
        .filter(|(key, _)| !matches!(key.as_str(), "name" | "description" | "parameters"))
    {
        keep(&mut spec.extra, key, value);
    }
    let outer: Map<String, Value> = fields
        .iter()
        .filter(|(key, _)| !matches!(key.as_str(), "type" | "function"))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    if !outer.is_empty() {
        reserve(&mut spec.extra, "outer", Value::Object(outer));
    }
    Ok(spec)
}

/// Prints tool specifications in OpenAI's form: equal as JSON to those that [`tools_from_json`] read.
pub fn tools_to_json(tools: &[ToolSpec]) -> Value {
    tools.iter().map(tool_to_json).collect()
}

fn tool_to_json(spec: &ToolSpec) -> Value {
    let mut function = Map::new();
    function.insert("name".into(), json!(spec.name));
    if !spec.description.is_empty() {
        function.insert("description".into(), json!(spec.description));
    } else if let Some(value) = reserved(&spec.extra, "description") {
        function.insert("description".into(), value.clone());
    }
    if !spec.parameters.is_null() {
        function.insert("parameters".into(), spec.parameters.clone());
    } else if reserved(&spec.extra, "parameters").is_some() {
        function.insert("parameters".into(), Value::Null);
    }
    put_extra(&mut function, &spec.extra);
    let mut fields = Map::new();
    fields.insert("type".into(), json!("function"));
    fields.insert("function".into(), Value::Object(function));
    if let Some(Value::Object(outer)) = reserved(&spec.extra, "outer") {
        fields.extend(outer.clone());
    }
    Value::Object(fields)
}

/// The JSON kind of a value, for messages. Never its content.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A text that should have been a word of ours: quoted if it looks like a word, else only measured, so that an error carries no
/// content into somebody's log.
fn quoted(text: &str) -> String {
    let is_word = |b: u8| b.is_ascii_lowercase() || matches!(b, b'_' | b'-');
    match !text.is_empty() && text.len() <= 16 && text.bytes().all(is_word) {
        true => format!("{text:?}"),
        false => format!("of {} bytes", text.len()),
    }
}

/// A value that should have been a short name.
fn short(value: &Value) -> String {
    match value {
        Value::String(text) => quoted(text),
        other => kind(other).into(),
    }
}
