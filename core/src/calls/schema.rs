//! JSON schemas of tool arguments: what kind of value a parameter takes, and whether a value satisfies its schema.

use serde_json::{Map, Value};

use crate::limits::MAX_JSON_DEPTH;

/// `$ref`s followed one after another before a schema counts as circular.
const MAX_REF_HOPS: usize = 32;
/// Keywords that only narrow and that the grammar leaves to [`check`].
const CHECKED_AFTERWARDS: [&str; 2] = ["uniqueItems", "not"];
/// String formats that the grammar knows; any other is an annotation, as JSON Schema has it by default.
const FORMATS: [&str; 10] = [
    "date-time",
    "time",
    "date",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
];

/// What a parameter takes, as far as the notation cares.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// One of these values; strings among them are written bare where that is unambiguous.
    Enum(Vec<Value>),
    /// Any of these, tried in order.
    Union(Vec<Kind>),
    /// JSON under this schema (cleaned, with the definitions it needs).
    Json(Value),
}

/// Sorts a parameter's schema into a [`Kind`]; `root` holds the definitions that `$ref` points into.
///
/// # Errors
/// A sentence about what cannot be expressed.
pub fn kind(schema: &Value, root: &Value) -> Result<Kind, String> {
    let resolved = resolve(schema, root)?;
    let Some(object) = resolved.as_object() else {
        return match resolved {
            Value::Bool(true) => Ok(Kind::Json(Value::Object(Map::new()))),
            Value::Bool(false) => Err("the schema is `false`, which no value satisfies".into()),
            _ => Err("a schema must be an object or a boolean".into()),
        };
    };
    if let Some(values) = object.get("enum") {
        let values = values.as_array().ok_or("`enum` must be an array")?;
        if values.is_empty() {
            return Err("`enum` is empty, so no value satisfies it".into());
        }
        let mut kept: Vec<Value> = Vec::new();
        for value in values {
            if check(value, resolved, root, "").is_ok() && !kept.contains(value) {
                kept.push(value.clone());
            }
        }
        if kept.is_empty() {
            return Err("no value of `enum` has the schema's own type".into());
        }
        return Ok(Kind::Enum(kept));
    }
    if let Some(value) = object.get("const") {
        return Ok(Kind::Enum(vec![value.clone()]));
    }
    // Only a bare `anyOf` is taken apart: with keywords beside it, the two would have to be intersected.
    let branches = object
        .get("anyOf")
        .or_else(|| object.get("oneOf"))
        .and_then(Value::as_array);
    if let Some(branches) = branches {
        let alone = object.keys().all(|key| {
            matches!(
                key.as_str(),
                "anyOf" | "oneOf" | "title" | "description" | "default" | "examples" | "$defs"
            )
        });
        let has_words = branches.iter().any(|b| {
            resolve(b, root).is_ok_and(|b| b.get("enum").is_some() || b.get("const").is_some())
        });
        if alone && has_words && !(object.contains_key("anyOf") && object.contains_key("oneOf")) {
            return branches
                .iter()
                .map(|b| kind(b, root))
                .collect::<Result<_, _>>()
                .map(Kind::Union);
        }
    }
    Ok(Kind::Json(clean(resolved, root)?))
}

/// The schema without annotations that the grammar compiler does not know, with the definitions that it refers to.
fn clean(schema: &Value, root: &Value) -> Result<Value, String> {
    let mut out = clean_inner(schema, 0)?;
    let mut wanted = Vec::new();
    references(&out, &mut wanted);
    let Some(object) = out.as_object_mut() else {
        return Ok(out);
    };
    for section in ["$defs", "definitions"] {
        if let Some(defs) = root.get(section).and_then(Value::as_object) {
            if wanted
                .iter()
                .any(|r| r.starts_with(&format!("#/{section}/")))
            {
                let defs: Map<String, Value> = defs
                    .iter()
                    .map(|(name, def)| Ok((name.clone(), clean_inner(def, 0)?)))
                    .collect::<Result<_, String>>()?;
                object.insert(section.into(), Value::Object(defs));
            }
        }
    }
    for reference in &wanted {
        follow(reference, root)?;
    }
    Ok(out)
}

fn clean_inner(schema: &Value, depth: usize) -> Result<Value, String> {
    if depth > MAX_JSON_DEPTH {
        return Err(format!("the schema is nested deeper than {MAX_JSON_DEPTH}"));
    }
    let Some(object) = schema.as_object() else {
        return Ok(schema.clone());
    };
    let mut out = Map::new();
    for (key, value) in object {
        let value = match key.as_str() {
            "title" | "description" | "default" | "examples" | "example" | "$schema" | "$id"
            | "$comment" | "deprecated" | "readOnly" | "writeOnly" | "nullable" | "strict"
            | "x-guidance" | "$defs" | "definitions" => continue,
            key if CHECKED_AFTERWARDS.contains(&key) => continue,
            "format" if !value.as_str().is_some_and(|f| FORMATS.contains(&f)) => continue,
            "properties" | "patternProperties" => match value.as_object() {
                Some(map) => Value::Object(
                    map.iter()
                        .map(|(k, v)| Ok((k.clone(), clean_inner(v, depth + 1)?)))
                        .collect::<Result<_, String>>()?,
                ),
                None => return Err(format!("`{key}` must be an object")),
            },
            "items" | "additionalProperties" | "additionalItems" => clean_inner(value, depth + 1)?,
            "anyOf" | "oneOf" | "allOf" | "prefixItems" => match value.as_array() {
                Some(list) => Value::Array(
                    list.iter()
                        .map(|v| clean_inner(v, depth + 1))
                        .collect::<Result<_, _>>()?,
                ),
                None => return Err(format!("`{key}` must be an array")),
            },
            _ => value.clone(),
        };
        out.insert(key.clone(), value);
    }
    // OpenAPI's way of saying "or null".
    if object.get("nullable") == Some(&Value::Bool(true)) {
        return Ok(serde_json::json!({ "anyOf": [Value::Object(out), { "type": "null" }] }));
    }
    Ok(Value::Object(out))
}

fn references(schema: &Value, out: &mut Vec<String>) {
    match schema {
        Value::Object(object) => {
            if let Some(reference) = object.get("$ref").and_then(Value::as_str) {
                out.push(reference.to_string());
            }
            object.values().for_each(|v| references(v, out));
        }
        Value::Array(list) => list.iter().for_each(|v| references(v, out)),
        _ => {}
    }
}

fn follow<'a>(reference: &str, root: &'a Value) -> Result<&'a Value, String> {
    let local = reference
        .strip_prefix("#/")
        .filter(|p| p.starts_with("$defs/") || p.starts_with("definitions/"));
    let Some(pointer) = local else {
        return Err(format!(
            "`$ref` {reference:?} cannot be followed: only #/$defs/... and #/definitions/... of the tool's own parameters can"
        ));
    };
    root.pointer(&format!("/{pointer}"))
        .ok_or_else(|| format!("`$ref` {reference:?} points at nothing"))
}

/// Follows `$ref` until there is none.
fn resolve<'a>(schema: &'a Value, root: &'a Value) -> Result<&'a Value, String> {
    let mut schema = schema;
    for _ in 0..MAX_REF_HOPS {
        match schema.get("$ref") {
            None => return Ok(schema),
            Some(Value::String(reference)) => schema = follow(reference, root)?,
            Some(_) => return Err("`$ref` must be a string".into()),
        }
    }
    Err(format!(
        "`$ref` was followed {MAX_REF_HOPS} times without arriving"
    ))
}

/// Nesting depth of a JSON value; a scalar has depth 0.
pub fn depth(value: &Value) -> usize {
    // An explicit stack: a hostile document must not use up the thread's.
    let mut deepest = 0;
    let mut stack = vec![(value, 0)];
    while let Some((value, at)) = stack.pop() {
        deepest = deepest.max(at);
        match value {
            Value::Array(list) => stack.extend(list.iter().map(|v| (v, at + 1))),
            Value::Object(map) => stack.extend(map.values().map(|v| (v, at + 1))),
            _ => {}
        }
    }
    deepest
}

/// A value that does not satisfy its schema: where, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    pub path: String,
    pub problem: String,
}

fn mismatch<T>(path: &str, problem: impl Into<String>) -> Result<T, Mismatch> {
    Err(Mismatch {
        path: path.into(),
        problem: problem.into(),
    })
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

fn is_type(value: &Value, name: &str) -> bool {
    match name {
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "number" => value.is_number(),
        "integer" => {
            value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|f| f.fract() == 0.0)
        }
        _ => true,
    }
}

/// Whether `value` satisfies `schema`. `pattern` and `format` are left to the grammar; every other keyword of
/// draft 2020-12 that tools use is checked.
///
/// # Errors
/// The path of the first value that does not fit, and why.
pub fn check(value: &Value, schema: &Value, root: &Value, path: &str) -> Result<(), Mismatch> {
    check_at(value, schema, root, path, 0)
}

fn check_at(
    value: &Value,
    schema: &Value,
    root: &Value,
    path: &str,
    level: usize,
) -> Result<(), Mismatch> {
    if level > 2 * MAX_JSON_DEPTH {
        return mismatch(path, "the schema is nested too deeply to check");
    }
    let next =
        |value: &Value, schema: &Value, path: &str| check_at(value, schema, root, path, level + 1);
    let schema = match resolve(schema, root) {
        Ok(schema) => schema,
        Err(problem) => return mismatch(path, problem),
    };
    let object = match schema {
        Value::Bool(true) => return Ok(()),
        Value::Bool(false) => return mismatch(path, "no value is allowed here"),
        Value::Object(object) => object,
        _ => return mismatch(path, "its schema is neither an object nor a boolean"),
    };
    if value.is_null() && object.get("nullable") == Some(&Value::Bool(true)) {
        return Ok(());
    }
    match object.get("type") {
        Some(Value::String(name)) if !is_type(value, name) => {
            return mismatch(path, format!("{name} expected, found {}", shown(value)))
        }
        Some(Value::Array(names))
            if !names
                .iter()
                .filter_map(Value::as_str)
                .any(|n| is_type(value, n)) =>
        {
            let names: Vec<_> = names.iter().filter_map(Value::as_str).collect();
            return mismatch(
                path,
                format!("{} expected, found {}", names.join(" or "), shown(value)),
            );
        }
        _ => {}
    }
    if let Some(values) = object.get("enum").and_then(Value::as_array) {
        if !values.iter().any(|v| super::same_value(v, value)) {
            let values: Vec<_> = values.iter().take(20).map(shown).collect();
            return mismatch(
                path,
                format!(
                    "one of {} expected, found {}",
                    values.join(", "),
                    shown(value)
                ),
            );
        }
    }
    if let Some(constant) = object.get("const") {
        if !super::same_value(constant, value) {
            return mismatch(
                path,
                format!("{} expected, found {}", shown(constant), shown(value)),
            );
        }
    }
    for branch in list(object, "allOf") {
        next(value, branch, path)?;
    }
    if object.contains_key("anyOf") && !list(object, "anyOf").any(|b| next(value, b, path).is_ok())
    {
        return mismatch(
            path,
            format!("{} fits none of the alternatives of `anyOf`", shown(value)),
        );
    }
    if object.contains_key("oneOf") {
        let fitting = list(object, "oneOf")
            .filter(|b| next(value, b, path).is_ok())
            .count();
        if fitting != 1 {
            return mismatch(
                path,
                format!(
                    "{} fits {fitting} alternatives of `oneOf` instead of one",
                    shown(value)
                ),
            );
        }
    }
    if object
        .get("not")
        .is_some_and(|not| next(value, not, path).is_ok())
    {
        return mismatch(path, format!("{} is what `not` forbids", shown(value)));
    }
    match value {
        Value::Number(number) => check_number(number.as_f64().unwrap_or(f64::NAN), object, path),
        Value::String(text) => check_count(
            text.chars().count(),
            object,
            "minLength",
            "maxLength",
            "characters",
            path,
        ),
        Value::Array(items) => {
            check_count(items.len(), object, "minItems", "maxItems", "items", path)?;
            let prefix: Vec<_> = list(object, "prefixItems").collect();
            for (i, item) in items.iter().enumerate() {
                let at = format!("{path}[{i}]");
                match prefix.get(i).copied().or(object.get("items")) {
                    Some(Value::Array(tuple)) => {
                        if let Some(schema) = tuple.get(i) {
                            next(item, schema, &at)?;
                        }
                    }
                    Some(schema) => next(item, schema, &at)?,
                    None => {}
                }
            }
            let unique = object.get("uniqueItems") == Some(&Value::Bool(true));
            if unique
                && (1..items.len())
                    .any(|i| items[..i].iter().any(|v| super::same_value(v, &items[i])))
            {
                return mismatch(path, "items must differ from one another");
            }
            Ok(())
        }
        Value::Object(fields) => {
            check_count(
                fields.len(),
                object,
                "minProperties",
                "maxProperties",
                "fields",
                path,
            )?;
            for name in list(object, "required").filter_map(Value::as_str) {
                if !fields.contains_key(name) {
                    return mismatch(&join(path, name), "required, but missing");
                }
            }
            let properties = object.get("properties").and_then(Value::as_object);
            let patterns = object.contains_key("patternProperties");
            for (name, field) in fields {
                let at = join(path, name);
                match (
                    properties.and_then(|p| p.get(name)),
                    object.get("additionalProperties"),
                ) {
                    (Some(schema), _) => next(field, schema, &at)?,
                    // A name may match a pattern; the grammar has checked that.
                    (None, Some(_)) if patterns => {}
                    (None, Some(Value::Bool(false))) => {
                        return mismatch(&at, "no such field is allowed")
                    }
                    (None, Some(schema)) => next(field, schema, &at)?,
                    (None, None) => {}
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_string()
    } else {
        format!("{path}.{name}")
    }
}

fn list<'a>(object: &'a Map<String, Value>, key: &str) -> impl Iterator<Item = &'a Value> {
    object
        .get(key)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

fn check_number(number: f64, object: &Map<String, Value>, path: &str) -> Result<(), Mismatch> {
    type Holds = fn(f64, f64) -> bool;
    let rules: [(&str, Holds, &str); 4] = [
        ("minimum", |n, limit| n >= limit, "at least"),
        ("maximum", |n, limit| n <= limit, "at most"),
        ("exclusiveMinimum", |n, limit| n > limit, "more than"),
        ("exclusiveMaximum", |n, limit| n < limit, "less than"),
    ];
    for (key, holds, words) in rules {
        if let Some(limit) = object.get(key).and_then(Value::as_f64) {
            if !holds(number, limit) {
                return mismatch(path, format!("{words} {limit} expected, found {number}"));
            }
        }
    }
    if let Some(step) = object
        .get("multipleOf")
        .and_then(Value::as_f64)
        .filter(|s| *s > 0.0)
    {
        let quotient = number / step;
        if (quotient - quotient.round()).abs() > 1e-9 * quotient.abs().max(1.0) {
            return mismatch(
                path,
                format!("a multiple of {step} expected, found {number}"),
            );
        }
    }
    Ok(())
}

fn check_count(
    n: usize,
    object: &Map<String, Value>,
    min: &str,
    max: &str,
    what: &str,
    path: &str,
) -> Result<(), Mismatch> {
    if object
        .get(min)
        .and_then(Value::as_u64)
        .is_some_and(|limit| (n as u64) < limit)
    {
        return mismatch(path, format!("{min} is {}, found {n} {what}", object[min]));
    }
    if object
        .get(max)
        .and_then(Value::as_u64)
        .is_some_and(|limit| n as u64 > limit)
    {
        return mismatch(path, format!("{max} is {}, found {n} {what}", object[max]));
    }
    Ok(())
}

/// The value with the fields of objects in the order their schema names them (unnamed ones after those, in their own
/// order) and whole-numbered floats as integers where an integer is asked for: the one form that the grammar admits.
pub fn canonical(value: &Value, schema: &Value, root: &Value) -> Value {
    canonical_at(value, schema, root, 0)
}

fn canonical_at(value: &Value, schema: &Value, root: &Value, level: usize) -> Value {
    let Ok(schema) = resolve(schema, root) else {
        return value.clone();
    };
    if level > 2 * MAX_JSON_DEPTH {
        return value.clone();
    }
    let branch = ["anyOf", "oneOf"].iter().find_map(|key| {
        schema
            .get(*key)?
            .as_array()?
            .iter()
            .find(|b| check(value, b, root, "").is_ok())
    });
    if let Some(branch) = branch {
        return canonical_at(value, branch, root, level + 1);
    }
    let all_of: Vec<&Value> = schema
        .get("allOf")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|s| resolve(s, root).ok())
        .chain([schema])
        .collect();
    match value {
        Value::Object(fields) => {
            let mut out = Map::new();
            for schema in &all_of {
                if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
                    for (name, schema) in properties {
                        if let Some(field) = fields.get(name) {
                            out.entry(name.clone())
                                .or_insert_with(|| canonical_at(field, schema, root, level + 1));
                        }
                    }
                }
            }
            for schema in &all_of {
                for name in schema
                    .get("required")
                    .and_then(Value::as_array)
                    .into_iter()
                    .flatten()
                {
                    if let Some((name, field)) = name.as_str().and_then(|n| fields.get_key_value(n))
                    {
                        out.entry(name.clone()).or_insert_with(|| field.clone());
                    }
                }
            }
            let others = schema.get("additionalProperties").filter(|s| s.is_object());
            for (name, field) in fields {
                out.entry(name.clone()).or_insert_with(|| match others {
                    Some(schema) => canonical_at(field, schema, root, level + 1),
                    None => field.clone(),
                });
            }
            Value::Object(out)
        }
        Value::Array(items) => {
            let prefix: Vec<&Value> = schema
                .get("prefixItems")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .collect();
            let each =
                |(i, item): (usize, &Value)| match prefix.get(i).copied().or(schema.get("items")) {
                    Some(schema) => canonical_at(item, schema, root, level + 1),
                    None => item.clone(),
                };
            Value::Array(items.iter().enumerate().map(each).collect())
        }
        Value::Number(number) => {
            let whole = number
                .as_f64()
                .filter(|f| number.is_f64() && f.fract() == 0.0 && f.abs() < 9e15);
            let integer = match schema.get("type") {
                Some(Value::String(name)) => name == "integer",
                Some(Value::Array(names)) => {
                    names.iter().any(|n| n == "integer") && !names.iter().any(|n| n == "number")
                }
                _ => false,
            };
            match whole {
                Some(whole) if integer => Value::from(whole as i64),
                _ => value.clone(),
            }
        }
        _ => value.clone(),
    }
}
