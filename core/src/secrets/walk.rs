//! Every text of a record, given to the detectors.

use serde_json::{Map, Value};

use super::{clean, keys::is_secret_name, mark, Detect, Kind};
use crate::episode::{
    Content, Counterfactual, DecisionRecord, Episode, Observation, Outcome, Step, ToolCall,
};

/// Nesting to which a JSON value is walked. What lies deeper is dropped: it could not be looked at.
const MAX_DEPTH: usize = 256;

/// Detectors, and what they found.
#[derive(Clone, Debug)]
pub struct Cleaner {
    detect: Detect,
    /// Kinds that something was found of, each once.
    pub kinds: Vec<Kind>,
}

impl Cleaner {
    pub fn new(detect: Detect) -> Self {
        Self {
            detect,
            kinds: Vec::new(),
        }
    }

    /// Cleans one text.
    pub fn text(&mut self, text: &mut String) -> bool {
        clean(text, self.detect, &mut self.kinds)
    }

    /// Cleans a name or an id. In one without a space random characters are nothing odd: many ids are drawn at random.
    pub fn name(&mut self, name: &mut String) -> bool {
        let detect = match name.contains(char::is_whitespace) {
            true => self.detect,
            false => self.detect.without(Kind::Entropy),
        };
        clean(name, detect, &mut self.kinds)
    }

    /// Cleans every string of a value, keys included, and the whole value of a field that is called after a secret.
    pub fn value(&mut self, value: &mut Value) -> bool {
        self.nested(value, 0)
    }

    fn nested(&mut self, value: &mut Value, depth: usize) -> bool {
        if depth > MAX_DEPTH {
            *value = Value::Null;
            return true;
        }
        match value {
            Value::String(text) => self.text(text),
            Value::Array(items) => {
                let mut changed = false;
                for item in items {
                    changed |= self.nested(item, depth + 1);
                }
                changed
            }
            Value::Object(map) => self.map_nested(map, depth + 1),
            // A card's number may come as a number.
            Value::Number(number) => {
                let mut text = number.to_string();
                let found = text.len() >= 13 && self.text(&mut text);
                if found {
                    *value = Value::String(text);
                }
                found
            }
            Value::Null | Value::Bool(_) => false,
        }
    }

    /// [`Cleaner::value`] for an object's fields.
    pub fn map(&mut self, map: &mut Map<String, Value>) -> bool {
        self.map_nested(map, 0)
    }

    fn map_nested(&mut self, map: &mut Map<String, Value>, depth: usize) -> bool {
        let mut changed = false;
        let mut renamed = false;
        for (key, item) in map.iter_mut() {
            if self.detect.has(Kind::Password) && is_secret_name(key.as_bytes()) {
                if let Value::String(secret) = item {
                    if !secret.is_empty() && !secret.starts_with('<') {
                        *item = Value::String(mark(Kind::Password, secret));
                        self.note(Kind::Password);
                        changed = true;
                    }
                }
            }
            changed |= self.nested(item, depth);
            renamed |= !super::find(key, self.detect).is_empty();
        }
        if renamed {
            let fields = std::mem::take(map);
            for (mut key, item) in fields {
                self.text(&mut key);
                map.insert(key, item);
            }
        }
        changed | renamed
    }

    fn note(&mut self, kind: Kind) {
        if !self.kinds.contains(&kind) {
            self.kinds.push(kind);
        }
    }

    fn maybe(&mut self, text: &mut Option<String>) -> bool {
        text.as_mut().is_some_and(|text| self.text(text))
    }

    fn content(&mut self, content: &mut Option<Content>) -> bool {
        match content {
            None => false,
            Some(Content::Text(text)) => self.text(text),
            Some(Content::Parts(parts)) => {
                let mut changed = false;
                for part in parts {
                    changed |= self.value(part);
                }
                changed
            }
        }
    }

    fn call(&mut self, call: &mut ToolCall) {
        self.name(&mut call.id);
        self.name(&mut call.name);
        let mut changed = self.value(&mut call.arguments);
        if let Some(raw) = call.arguments_raw.as_mut() {
            changed |= self.text(raw);
        }
        // The bytes as they came may spell a secret otherwise than the parsed value (`\u0041KIA`): the value is kept.
        if changed && !call.arguments.is_null() {
            call.arguments_raw = None;
        }
        self.map(&mut call.extra);
    }

    fn decision(&mut self, decision: &mut DecisionRecord) {
        self.text(&mut decision.reason);
    }
}

/// Cleans a whole episode and notes in its provenance what kinds there were.
pub fn clean_episode(episode: &mut Episode, cleaner: &mut Cleaner) {
    let task = &mut episode.task;
    cleaner.name(&mut task.id);
    cleaner.name(&mut task.domain);
    task.group_key.as_mut().map(|key| cleaner.name(key));
    cleaner.text(&mut task.instruction);
    episode.session_id.as_mut().map(|id| cleaner.name(id));
    cleaner.name(&mut episode.agent.name);
    cleaner.name(&mut episode.agent.version);
    for tool in &mut episode.tools {
        cleaner.text(&mut tool.description);
        cleaner.value(&mut tool.parameters);
        cleaner.map(&mut tool.extra);
    }
    for step in &mut episode.steps {
        clean_step(step, cleaner);
    }
    if let Some(outcome) = episode.outcome.as_mut() {
        clean_outcome(outcome, cleaner);
    }
    let source = episode.provenance.source_id.as_mut();
    source.map(|source| cleaner.name(source));
    cleaner.map(&mut episode.extra);
    for kind in &cleaner.kinds {
        let name = kind.name();
        if !episode.provenance.redactions.iter().any(|r| r == name) {
            episode.provenance.redactions.push(name.into());
        }
    }
}

/// Cleans a step with its calls and observations. The tokens of a step in which something was found are dropped: they spell it out.
pub fn clean_step(step: &mut Step, cleaner: &mut Cleaner) {
    let before = std::mem::take(&mut cleaner.kinds);
    step.model.as_mut().map(|name| cleaner.name(name));
    cleaner.content(&mut step.message);
    cleaner.maybe(&mut step.reasoning);
    for call in &mut step.tool_calls {
        cleaner.call(call);
    }
    for observation in &mut step.observations {
        clean_observation(observation, cleaner);
    }
    if let Some(decision) = step.decision.as_mut() {
        cleaner.decision(decision);
    }
    if let Some(value) = step.counterfactual.as_mut() {
        clean_counterfactual(value, cleaner);
    }
    if let Some(label) = step.label.as_mut() {
        cleaner.text(&mut label.reason);
    }
    cleaner.map(&mut step.extra);
    if !cleaner.kinds.is_empty() {
        step.token_ids = None;
    }
    for kind in before {
        cleaner.note(kind);
    }
}

/// Cleans a tool's result.
pub fn clean_observation(observation: &mut Observation, cleaner: &mut Cleaner) {
    observation.call_id.as_mut().map(|id| cleaner.name(id));
    cleaner.content(&mut observation.content);
    cleaner.map(&mut observation.extra);
}

/// Cleans what the one who did not act would have done.
pub fn clean_counterfactual(value: &mut Counterfactual, cleaner: &mut Cleaner) {
    for call in &mut value.tool_calls {
        cleaner.call(call);
    }
    cleaner.maybe(&mut value.message);
}

/// Cleans the host's words on how an episode ended.
pub fn clean_outcome(outcome: &mut Outcome, cleaner: &mut Cleaner) {
    cleaner.maybe(&mut outcome.reason);
    for criterion in &mut outcome.criteria {
        cleaner.name(&mut criterion.id);
        cleaner.text(&mut criterion.evidence);
    }
    for tag in &mut outcome.tags {
        cleaner.name(tag);
    }
    for flag in &mut outcome.integrity.flags {
        cleaner.text(flag);
    }
    cleaner.name(&mut outcome.judge.name);
    cleaner.map(&mut outcome.extra);
}
