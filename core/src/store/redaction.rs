//! What is taken out of a record by the writer thread, before it keeps anything of it: first the detectors, then the policy's hook.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;

use super::Record;
use crate::secrets::{
    clean_counterfactual, clean_episode, clean_observation, clean_outcome, clean_step, Cleaner,
    Detect,
};

/// Changes the texts of a record, on the writer thread, and names what it changed (`user`, `tool`, ...), or says why it cannot.
pub type Redact = Arc<dyn Fn(&mut Record) -> Result<Vec<String>, String> + Send + Sync>;

/// A record that may be written.
pub struct Cleaned {
    pub record: Record,
    pub bytes: usize,
    /// Detectors and roles by which something was changed.
    pub redacted: Vec<String>,
    /// Set where the record could only be kept without its content.
    pub lost: Option<String>,
}

/// Runs the detectors and the hook over a record. One that the hook cannot clean is replaced by the mark that it was lost.
pub fn clean(mut record: Record, bytes: usize, detect: Detect, hook: Option<Redact>) -> Cleaned {
    let whole = catch_unwind(AssertUnwindSafe(|| {
        let mut redacted = detected(&mut record, detect);
        if let Some(hook) = hook {
            for name in hook(&mut record)? {
                if !redacted.contains(&name) {
                    redacted.push(name);
                }
            }
        }
        Ok(redacted)
    }));
    let failed = |why: String| format!("{} was not recorded: {why}", part(&record));
    match whole.unwrap_or_else(|_| Err("the redaction panicked".into())) {
        Ok(redacted) => Cleaned {
            record,
            bytes,
            redacted,
            lost: None,
        },
        Err(why) => {
            let why = failed(why);
            let (record, lost) = match record {
                // The episode must be there for the others to belong to it.
                Record::Begin(mut episode) => {
                    episode.task.instruction.clear();
                    episode.steps.clear();
                    episode.incomplete = true;
                    (Record::Begin(episode), Some(why))
                }
                other => {
                    let (episode, reason) = (other.episode(), why);
                    (Record::Incomplete { episode, reason }, None)
                }
            };
            Cleaned {
                record,
                bytes,
                redacted: Vec::new(),
                lost,
            }
        }
    }
}

fn part(record: &Record) -> &'static str {
    match record {
        Record::Begin(_) => "the task's instruction",
        Record::Observation { .. } => "a result",
        _ => "a step",
    }
}

fn detected(record: &mut Record, detect: Detect) -> Vec<String> {
    let mut cleaner = Cleaner::new(detect);
    match record {
        Record::Begin(episode) => clean_episode(episode, &mut cleaner),
        Record::Step { step, .. } => clean_step(step, &mut cleaner),
        Record::Observation { observation, .. } => clean_observation(observation, &mut cleaner),
        Record::Counterfactual { value, .. } => clean_counterfactual(value, &mut cleaner),
        Record::Outcome { outcome, .. } => clean_outcome(outcome, &mut cleaner),
        Record::Incomplete { reason, .. } => {
            cleaner.text(reason);
        }
        Record::Drop { .. } => {}
    }
    let kinds = cleaner.kinds.iter();
    kinds.map(|kind| kind.name().to_owned()).collect()
}
