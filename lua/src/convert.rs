//! Values on their way into Lua (as frozen tables) and out of it (checked field by field).
//!
//! Everything that comes from a script is read raw: a metamethod would run outside the time limit of its hook.

use locum_core::limits;
use locum_core::policy::{
    Allow, Choice, CurateVerdict, FastVerdict, GateVote, LabelVerdict, RecipeKnobs, Retain,
    ScheduleVerdict, Settings, StepInfo, StudentInfo, Who,
};
use locum_core::view::View;
use mlua::serde::SerializeOptions;
use mlua::{Function, Lua, LuaSerdeExt, MultiValue, Table, Value};
use serde::de::DeserializeOwned;
use serde::Serialize;

use crate::hooks::{Failure, Hook};
use crate::sandbox::tidy;
use crate::PolicyError;

/// Longest reason kept of a verdict, in bytes.
const MAX_REASON_BYTES: usize = 300;
/// Tags of one label.
const MAX_TAGS: usize = 32;
/// Deepest nesting of a table that declares data.
const MAX_DEPTH: usize = 8;
/// Entries of a table that declares data.
const MAX_ENTRIES: usize = 256;
/// Largest sampling temperature that a hook may set.
const MAX_TEMPERATURE: f64 = 2.0;
/// Largest factor on the step size of fast weights.
const MAX_FAST_STEP: f64 = 10.0;
/// Largest weight of an episode in a dataset.
const MAX_WEIGHT: f64 = 100.0;

const STATUSES: &[&str] = &["success", "partial", "failure", "aborted", "unknown"];

/// A hook's argument as a table; absent options are absent fields, JSON null is absent too. The caller freezes it.
pub fn argument(lua: &Lua, value: &impl Serialize) -> Result<Table, Failure> {
    let options = SerializeOptions::new()
        .set_array_metatable(false)
        .serialize_none_to_null(false)
        .serialize_unit_to_null(false);
    match lua.to_value_with(value, options) {
        Ok(Value::Table(table)) => Ok(table),
        Ok(other) => Err(Failure::Argument(format!(
            "expected a table, found {}",
            type_name(other)
        ))),
        Err(e) => Err(not_made(e)),
    }
}

fn not_made(error: mlua::Error) -> Failure {
    match error {
        mlua::Error::MemoryError(_) => Failure::Memory {
            at: Default::default(),
        },
        e => Failure::Argument(tidy(&e.to_string(), MAX_REASON_BYTES)),
    }
}

/// Makes arguments of `decide` as [`argument`] would, at a fraction of its cost: one call into Lua sets the fields, and what is
/// the same from step to step stays a table, which nobody can change because it is frozen.
pub struct Steps {
    make: Function,
    tools: Option<(Vec<String>, Table)>,
    student: Option<(StudentInfo, Table)>,
}

impl Steps {
    /// `make` is the prelude's.
    pub fn new(make: Function) -> Self {
        Self {
            make,
            tools: None,
            student: None,
        }
    }

    pub fn table(&mut self, lua: &Lua, step: &StepInfo) -> Result<Table, Failure> {
        let tools = kept(&mut self.tools, lua, &step.tools)?;
        let student = match &step.student {
            Some(student) => Some(kept(&mut self.student, lua, student)?),
            None => None,
        };
        self.make
            .call((
                &*step.task,
                &*step.domain,
                step.turn,
                tools,
                step.prompt_bytes,
                step.novelty,
                step.deadline_ms,
                student,
                &*step.stage,
            ))
            .map_err(not_made)
    }
}

/// The table of a value: the one made last, if that was made of an equal value.
fn kept<T: Clone + PartialEq + Serialize>(
    last: &mut Option<(T, Table)>,
    lua: &Lua,
    value: &T,
) -> Result<Table, Failure> {
    if let Some((of, table)) = last {
        if of == value {
            return Ok(table.clone());
        }
    }
    let table = argument(lua, value)?;
    *last = Some((value.clone(), table.clone()));
    Ok(table)
}

/// The functions that a policy's table holds under the names of hooks.
///
/// # Errors
/// [`PolicyError::Shape`] for a hook that is no function and for a function that is no hook.
pub fn hooks_of(
    name: &str,
    policy: &Table,
) -> Result<[Option<Function>; Hook::ALL.len()], PolicyError> {
    let shape = |message: String| PolicyError::Shape {
        message: format!("{name}: {message}"),
    };
    let known = |key: &str| Hook::ALL.iter().find(|hook| hook.name() == key);
    let mut hooks = [const { None }; Hook::ALL.len()];
    for pair in policy.pairs::<Value, Value>() {
        let (key, value) = pair.map_err(|e| shape(e.to_string()))?;
        let Some(key) = key.as_string().map(|key| tidy(&key.to_string_lossy(), 60)) else {
            return Err(shape(format!(
                "the policy's table must have names as keys, found a {}",
                type_name(&key)
            )));
        };
        match (known(&key), value) {
            (Some(hook), Value::Function(function)) => hooks[*hook as usize] = Some(function),
            (Some(_), other) => {
                return Err(shape(format!(
                    "{key} must be a function, found {}",
                    type_name(other)
                )))
            }
            (None, Value::Function(_)) if key == "selftest" => {}
            (None, Value::Function(_)) => {
                let names: Vec<_> = Hook::ALL.iter().map(|hook| hook.name()).collect();
                return Err(shape(format!(
                    "{key} is no hook; the hooks are {} and selftest",
                    names.join(", ")
                )));
            }
            (None, Value::Table(_)) => {}
            (None, other) if ["view", "settings", "selftest"].contains(&&key[..]) => {
                return Err(shape(format!(
                    "{key} has the wrong type: {}",
                    type_name(other)
                )));
            }
            // Constants that the hooks read from their own table.
            (None, _) => {}
        }
    }
    Ok(hooks)
}

/// What the policy declares under `view` and `settings`.
///
/// # Errors
/// [`PolicyError::Shape`] naming the unknown or ill-typed field.
pub fn declared(name: &str, policy: &Table) -> Result<(View, Settings), PolicyError> {
    let view = declaration::<View>(name, policy, "view")?;
    view.check().map_err(|e| PolicyError::Shape {
        message: format!("{name}: {e}"),
    })?;
    let settings = declaration::<Settings>(name, policy, "settings")?;
    check_settings(&settings).map_err(|message| PolicyError::Shape {
        message: format!("{name}: {message}"),
    })?;
    Ok((view, settings))
}

fn declaration<T: DeserializeOwned + Default>(
    name: &str,
    policy: &Table,
    key: &str,
) -> Result<T, PolicyError> {
    let shape = |message: String| PolicyError::Shape {
        message: format!("{name}: {key}: {message}"),
    };
    match policy
        .raw_get::<Value>(key)
        .map_err(|e| shape(e.to_string()))?
    {
        Value::Nil => Ok(T::default()),
        Value::Table(table) => from_table(&table).map_err(shape),
        other => Err(shape(format!(
            "must be a table, found {}",
            type_name(other)
        ))),
    }
}

fn check_settings(settings: &Settings) -> Result<(), String> {
    let (c, g) = (&settings.curate, &settings.gate);
    let shares = [
        ("curate.held_out", c.held_out, 0.9),
        ("curate.near_duplicate", c.near_duplicate, 1.0),
        ("curate.derail_tolerance", c.derail_tolerance, 1.0),
        ("curate.max_length_ratio", c.max_length_ratio, 1e6),
        ("gate.margin", g.margin, 0.5),
        ("gate.alpha", g.alpha, 0.5),
        ("gate.min_exact", g.min_exact, 1.0),
        ("gate.max_shadow_failures", g.max_shadow_failures, 1.0),
        ("gate.canary_share", g.canary_share, 1.0),
        ("gate.keep_teacher", g.keep_teacher, 1.0),
    ];
    for (field, value, most) in shares {
        if !(0.0..=most).contains(&value) {
            return Err(format!(
                "settings.{field} must lie between 0 and {most}, found {value}"
            ));
        }
    }
    if g.alpha == 0.0 {
        return Err(
            "settings.gate.alpha must be above 0: no test has a rate of error of zero".into(),
        );
    }
    if g.max_canary < g.min_canary {
        return Err(format!(
            "settings.gate.max_canary ({}) is below min_canary ({})",
            g.max_canary, g.min_canary
        ));
    }
    Ok(())
}

/// Reads a table of plain data into a struct that refuses unknown fields.
fn from_table<T: DeserializeOwned>(table: &Table) -> Result<T, String> {
    let json = json(Value::Table(table.clone()), 0)?;
    serde_json::from_value(json).map_err(|e| tidy(&e.to_string(), 500))
}

fn json(value: Value, depth: usize) -> Result<serde_json::Value, String> {
    Ok(match value {
        Value::Nil => serde_json::Value::Null,
        Value::Boolean(b) => b.into(),
        Value::Integer(i) => i.into(),
        Value::Number(n) if n.is_finite() => n.into(),
        Value::Number(n) => return Err(format!("{n} is no usable number")),
        Value::String(s) => text(&s)?.into(),
        Value::Table(table) if depth < MAX_DEPTH => {
            let mut map = serde_json::Map::new();
            for pair in table.pairs::<Value, Value>() {
                let (key, value) = pair.map_err(|e| e.to_string())?;
                let Value::String(key) = key else {
                    return Err("must have names as keys, not a list".into());
                };
                if map.len() == MAX_ENTRIES {
                    return Err(format!("has more than {MAX_ENTRIES} entries"));
                }
                let key = text(&key)?;
                let value = json(value, depth + 1).map_err(|e| format!("{key}: {e}"))?;
                map.insert(key, value);
            }
            map.into()
        }
        Value::Table(_) => return Err(format!("is nested deeper than {MAX_DEPTH}")),
        other => return Err(format!("a {} is no data", type_name(other))),
    })
}

fn text(s: &mlua::LuaString) -> Result<String, String> {
    s.to_str()
        .map(|s| s.to_owned())
        .map_err(|_| "text that is not UTF-8".into())
}

/// What a hook returned, with the sentences for what it should have.
pub struct Returned {
    values: std::collections::VecDeque<Value>,
}

impl From<MultiValue> for Returned {
    fn from(values: MultiValue) -> Self {
        Self {
            values: values.into_iter().collect(),
        }
    }
}

type Read<T> = Result<T, Failure>;

fn wrong<T>(message: impl Into<String>) -> Read<T> {
    Err(Failure::Returned(message.into()))
}

impl Returned {
    fn get(&self, index: usize) -> &Value {
        self.values.get(index).unwrap_or(&Value::Nil)
    }

    fn is_nothing(&self) -> bool {
        self.values.is_empty()
    }

    /// The second value, where it is given a string.
    fn reason(&self) -> Read<String> {
        reason(self.get(1), "the second value (reason)")
    }

    /// `"student"` or `"teacher"`, reason, options; or a table with `who`, `reason` and the options.
    pub fn choice(&self, keep: &str) -> Read<Choice> {
        let mut choice;
        let options = match self.get(0) {
            Value::Table(table) => {
                only_fields(table, &["who", "reason", "temperature", "max_tokens"])?;
                choice = who(&field(table, "who")?, keep, "field `who`")?;
                choice.reason = reason(&field(table, "reason")?, "field `reason`")?;
                Some(table)
            }
            value => {
                choice = who(value, keep, "the first value")?;
                choice.reason = self.reason()?;
                match self.get(2) {
                    Value::Nil => None,
                    Value::Table(table) => {
                        only_fields(table, &["temperature", "max_tokens"])?;
                        Some(table)
                    }
                    other => {
                        return wrong(format!(
                            "the third value (options) must be a table, found {}",
                            type_name(other)
                        ))
                    }
                }
            }
        };
        if let Some(table) = options {
            choice.temperature =
                number(table, "temperature", 0.0, MAX_TEMPERATURE)?.map(|t| t as f32);
            choice.max_tokens =
                match number(table, "max_tokens", 1.0, limits::MAX_REPLY_TOKENS as f64)? {
                    Some(n) if n.fract() != 0.0 => {
                        return wrong("field `max_tokens` must be a whole number")
                    }
                    n => n.map(|n| n as u32),
                };
        }
        Ok(choice)
    }

    /// `true`, `false` or `"teacher"`, and a reason.
    pub fn allow(&self) -> Read<Allow> {
        match self.get(0) {
            Value::Boolean(true) => Ok(Allow::Yes),
            Value::Boolean(false) => {
                Ok(Allow::No(or_else(self.reason()?, "refused by the policy")))
            }
            Value::String(s) if s.as_bytes() == b"teacher" => {
                Ok(Allow::No(or_else(self.reason()?, "left to the teacher")))
            }
            other => wrong(format!(
                "the first value must be true, false or \"teacher\", found {}",
                kind(other)
            )),
        }
    }

    /// A string, or an explicit `nil` to drop the content.
    pub fn redacted(&self) -> Read<Option<String>> {
        if self.is_nothing() {
            return wrong("nothing; return the content, or nil to drop it");
        }
        match self.get(0) {
            Value::Nil => Ok(None),
            Value::String(s) if s.as_bytes().len() > limits::MAX_STEP_BYTES => wrong(format!(
                "{} bytes of content, the limit is {}",
                s.as_bytes().len(),
                limits::MAX_STEP_BYTES
            )),
            Value::String(s) => match s.to_str() {
                Ok(s) => Ok(Some(s.to_owned())),
                Err(_) => wrong("content that is not UTF-8"),
            },
            other => wrong(format!(
                "the content must be a string or nil, found {}",
                type_name(other)
            )),
        }
    }

    /// `nil`, or a table with `status` or `success`, `score`, `tags`.
    pub fn label(&self) -> Read<Option<LabelVerdict>> {
        let table = match self.get(0) {
            Value::Nil => return Ok(None),
            Value::Table(table) => table,
            other => {
                return wrong(format!(
                    "the label must be a table or nil, found {}",
                    type_name(other)
                ))
            }
        };
        only_fields(table, &["status", "success", "score", "tags"])?;
        let status = match (field(table, "status")?, field(table, "success")?) {
            (Value::Nil, Value::Nil) => None,
            (Value::Nil, Value::Boolean(success)) => {
                Some(if success { "success" } else { "failure" }.to_owned())
            }
            (Value::Nil, other) => {
                return wrong(format!(
                    "field `success` must be a boolean, found {}",
                    type_name(other)
                ))
            }
            (Value::String(s), Value::Nil) => match STATUSES
                .iter()
                .find(|known| s.as_bytes() == known.as_bytes())
            {
                Some(known) => Some((*known).to_owned()),
                None => {
                    return wrong(format!(
                        "field `status` must be one of {}",
                        STATUSES.join(", ")
                    ))
                }
            },
            (Value::String(_), _) => {
                return wrong("fields `status` and `success` exclude each other")
            }
            (other, _) => {
                return wrong(format!(
                    "field `status` must be a string, found {}",
                    type_name(other)
                ))
            }
        };
        let score = number(table, "score", f64::MIN, f64::MAX)?;
        let tags = match field(table, "tags")? {
            Value::Nil => Vec::new(),
            Value::Table(list) => tags(&list)?,
            other => {
                return wrong(format!(
                    "field `tags` must be a list, found {}",
                    type_name(other)
                ))
            }
        };
        Ok(Some(LabelVerdict {
            status,
            score,
            tags,
        }))
    }

    /// A boolean and a reason; or a table with `use`, `weight`, `reason`.
    pub fn curate(&self) -> Read<CurateVerdict> {
        match self.get(0) {
            Value::Boolean(use_it) => Ok(CurateVerdict {
                use_it: *use_it,
                weight: weight_of(*use_it),
                reason: self.reason()?,
            }),
            Value::Table(table) => {
                only_fields(table, &["use", "weight", "reason"])?;
                let use_it = match field(table, "use")? {
                    Value::Boolean(use_it) => use_it,
                    other => {
                        return wrong(format!(
                            "field `use` must be a boolean, found {}",
                            type_name(other)
                        ))
                    }
                };
                let weight = number(table, "weight", 0.0, MAX_WEIGHT)?
                    .map_or(weight_of(use_it), |w| w as f32);
                Ok(CurateVerdict {
                    use_it,
                    weight,
                    reason: reason(&field(table, "reason")?, "field `reason`")?,
                })
            }
            other => wrong(format!(
                "the verdict must be a boolean or a table, found {}",
                type_name(other)
            )),
        }
    }

    /// `"now"` or `"wait"`, and a reason.
    pub fn schedule(&self) -> Read<ScheduleVerdict> {
        let now = match self.get(0) {
            Value::String(s) if s.as_bytes() == b"now" => true,
            Value::String(s) if s.as_bytes() == b"wait" => false,
            other => {
                return wrong(format!(
                    "the first value must be \"now\" or \"wait\", found {}",
                    kind(other)
                ))
            }
        };
        Ok(ScheduleVerdict {
            now,
            reason: self.reason()?,
        })
    }

    /// `nil`, or a table of [`RecipeKnobs`].
    pub fn recipe(&self) -> Read<Option<RecipeKnobs>> {
        match self.get(0) {
            Value::Nil => Ok(None),
            Value::Table(table) => from_table(table).map(Some).map_err(Failure::Returned),
            other => wrong(format!(
                "the knobs must be a table or nil, found {}",
                type_name(other)
            )),
        }
    }

    /// `"promote"`, `"hold"` or `"reject"`, and a reason.
    pub fn gate(&self) -> Read<GateVote> {
        let reason = self.reason()?;
        match self.get(0) {
            Value::String(s) if s.as_bytes() == b"promote" => Ok(GateVote::Promote(reason)),
            Value::String(s) if s.as_bytes() == b"hold" => Ok(GateVote::Hold(reason)),
            Value::String(s) if s.as_bytes() == b"reject" => Ok(GateVote::Reject(reason)),
            other => wrong(format!(
                "the first value must be \"promote\", \"hold\" or \"reject\", found {}",
                kind(other)
            )),
        }
    }

    /// `nil`, or a boolean and a reason.
    pub fn rollback(&self) -> Read<Option<(bool, String)>> {
        match self.get(0) {
            Value::Nil => Ok(None),
            Value::Boolean(back) => Ok(Some((*back, self.reason()?))),
            other => wrong(format!(
                "the first value must be a boolean or nil, found {}",
                type_name(other)
            )),
        }
    }

    /// A word.
    pub fn retain(&self) -> Read<Retain> {
        match self.get(0) {
            Value::String(s) if s.as_bytes() == b"keep" => Ok(Retain::Keep),
            Value::String(s) if s.as_bytes() == b"drop" => Ok(Retain::Drop),
            Value::String(s) if s.as_bytes() == b"anonymise" => Ok(Retain::Anonymise),
            other => wrong(format!(
                "the first value must be \"keep\", \"drop\" or \"anonymise\", found {}",
                kind(other)
            )),
        }
    }

    /// `nil` for "as trained", a boolean and a reason; or a table with `on`, `step`, `reset`, `reason`.
    pub fn fast_weights(&self) -> Read<FastVerdict> {
        let trained = FastVerdict::as_trained();
        match self.get(0) {
            Value::Nil => Ok(trained),
            Value::Boolean(on) => Ok(FastVerdict {
                on: *on,
                reason: self.reason()?,
                ..trained
            }),
            Value::Table(table) => {
                only_fields(table, &["on", "step", "reset", "reason"])?;
                let step = number(table, "step", 0.0, MAX_FAST_STEP)?;
                Ok(FastVerdict {
                    on: flag(table, "on")?.unwrap_or(true),
                    step: step.map_or(trained.step, |step| step as f32),
                    reset: flag(table, "reset")?.unwrap_or(false),
                    reason: reason(&field(table, "reason")?, "field `reason`")?,
                })
            }
            other => wrong(format!(
                "the verdict must be a boolean, a table or nil, found {}",
                type_name(other)
            )),
        }
    }
}

fn weight_of(use_it: bool) -> f32 {
    if use_it {
        1.0
    } else {
        0.0
    }
}

fn who(value: &Value, keep: &str, place: &str) -> Read<Choice> {
    match value {
        Value::String(s) if s.as_bytes() == b"teacher" => Ok(Choice::teacher("")),
        Value::String(s) if s.as_bytes() == b"student" || s.as_bytes() == keep.as_bytes() => {
            Ok(Choice {
                who: Who::Student,
                ..Choice::teacher("")
            })
        }
        other => wrong(format!(
            "{place} must be \"{keep}\" or \"teacher\", found {}",
            kind(other)
        )),
    }
}

fn reason(value: &Value, place: &str) -> Read<String> {
    match value {
        Value::Nil => Ok(String::new()),
        Value::String(s) => Ok(tidy(&s.to_string_lossy(), MAX_REASON_BYTES)),
        other => wrong(format!(
            "{place} must be a string, found {}",
            type_name(other)
        )),
    }
}

fn tags(list: &Table) -> Read<Vec<String>> {
    let mut tags = Vec::new();
    for index in 1..=MAX_TAGS + 1 {
        match list
            .raw_get::<Value>(index)
            .map_err(|e| Failure::Returned(e.to_string()))?
        {
            Value::Nil => return Ok(tags),
            Value::String(s) => tags.push(tidy(&s.to_string_lossy(), limits::MAX_NAME_BYTES)),
            other => {
                return wrong(format!(
                    "field `tags`: entry {index} must be a string, found {}",
                    type_name(other)
                ))
            }
        }
    }
    wrong(format!("field `tags` has more than {MAX_TAGS} entries"))
}

fn field(table: &Table, key: &str) -> Read<Value> {
    table
        .raw_get(key)
        .map_err(|e| Failure::Returned(tidy(&e.to_string(), MAX_REASON_BYTES)))
}

/// A finite number in a range, if the field is there.
fn number(table: &Table, key: &str, least: f64, most: f64) -> Read<Option<f64>> {
    let number = match field(table, key)? {
        Value::Nil => return Ok(None),
        Value::Integer(i) => i as f64,
        Value::Number(n) => n,
        other => {
            return wrong(format!(
                "field `{key}` must be a number, found {}",
                type_name(other)
            ))
        }
    };
    if !number.is_finite() || !(least..=most).contains(&number) {
        return wrong(match (least, most) {
            (f64::MIN, f64::MAX) => format!("field `{key}` must be a finite number"),
            _ => format!("field `{key}` must lie between {least} and {most}"),
        });
    }
    Ok(Some(number))
}

/// A boolean, if the field is there.
fn flag(table: &Table, key: &str) -> Read<Option<bool>> {
    match field(table, key)? {
        Value::Nil => Ok(None),
        Value::Boolean(flag) => Ok(Some(flag)),
        other => wrong(format!(
            "field `{key}` must be a boolean, found {}",
            type_name(other)
        )),
    }
}

fn only_fields(table: &Table, known: &[&str]) -> Read<()> {
    for pair in table.pairs::<Value, Value>() {
        let (key, _) =
            pair.map_err(|e| Failure::Returned(tidy(&e.to_string(), MAX_REASON_BYTES)))?;
        if !key
            .as_string()
            .is_some_and(|s| known.iter().any(|k| s.as_bytes() == k.as_bytes()))
        {
            // The name of a field is the script's own word, unless the key was computed: then it may be data.
            let name = key
                .as_string()
                .map(|s| s.to_string_lossy())
                .filter(|name| is_word(name));
            let name = name.map_or("a field that is no name".into(), |name| {
                format!("unknown field `{name}`")
            });
            return wrong(format!("{name}; known are {}", known.join(", ")));
        }
    }
    Ok(())
}

fn is_word(name: &str) -> bool {
    name.len() <= 30 && name.bytes().all(|b| b.is_ascii_alphabetic() || b == b'_')
}

fn or_else(reason: String, default: &str) -> String {
    if reason.is_empty() {
        default.into()
    } else {
        reason
    }
}

/// The type of a value, or that it is another string: its text may be data.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "another string",
        other => type_name(other),
    }
}

/// The word that a script would use: Luau has one type of numbers.
pub fn type_name(value: impl std::borrow::Borrow<Value>) -> &'static str {
    match value.borrow() {
        Value::Integer(_) => "number",
        other => other.type_name(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The maker of the prelude, in a state of its own.
    fn maker(lua: &Lua) -> Steps {
        let bounds = lua.create_table().unwrap();
        bounds.raw_set("work", 1000).unwrap();
        let locum = lua.create_table().unwrap();
        let hash = lua.create_function(|_, ()| Ok(0.0)).unwrap();
        locum.raw_set("hash", hash).unwrap();
        lua.globals().raw_set("locum", locum).unwrap();
        let (_, make) = lua
            .load(include_str!("prelude.lua"))
            .call::<(Function, Function)>(bounds)
            .unwrap();
        Steps::new(make)
    }

    /// Every field of a table, in the order of names.
    fn fields(value: &Value) -> String {
        let Value::Table(table) = value else {
            return format!("{value:?}");
        };
        let mut all: Vec<String> = table
            .pairs::<Value, Value>()
            .map(|pair| pair.map(|(k, v)| format!("{k:?}={}", fields(&v))).unwrap())
            .collect();
        all.sort();
        format!("{{{}}}", all.join(", "))
    }

    #[test]
    fn a_step_is_made_as_any_other_argument_and_keeps_what_is_the_same() {
        let lua = Lua::new();
        let mut steps = maker(&lua);
        let student = StudentInfo {
            id: "a1".into(),
            version: 7,
            live_success: None,
            live_episodes: 3,
            held_out_exact: Some(0.5),
        };
        let first = StepInfo {
            task: "refund \u{e9}\0".into(),
            turn: 4,
            tools: vec!["a".into(), "b".into()],
            prompt_bytes: 5_000_000_000,
            novelty: 0.25,
            deadline_ms: 30_000,
            student: Some(student.clone()),
            stage: "canary".into(),
            ..StepInfo::default()
        };
        let mut other = first.clone();
        other.turn = 5;
        other.tools.push("c".into());
        other.student = Some(StudentInfo {
            live_success: Some(1.0),
            ..student
        });
        let mut tables = Vec::new();
        for step in [&first, &StepInfo::default(), &other, &first, &first] {
            let made = steps.table(&lua, step).unwrap();
            let plain = argument(&lua, step).unwrap();
            assert_eq!(
                fields(&Value::Table(made.clone())),
                fields(&Value::Table(plain))
            );
            tables.push(made);
        }
        let student = |at: usize| tables[at].raw_get::<Table>("student").unwrap().to_pointer();
        assert_eq!(student(3), student(4), "an equal student is one table");
        assert_ne!(student(2), student(3));
    }
}
