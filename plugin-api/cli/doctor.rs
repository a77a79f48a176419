//! `locum doctor`: what this machine and this store can do, and what stands in the way.

use locum_core::device::{Card, DeviceError};
use locum_core::registry::{Registry, RegistryError};
use locum_core::report::{disk_free_bytes, machine};
use serde_json::{json, Map, Value};

use crate::fail::Fail;
use crate::out::{bytes, Out};
use crate::Place;

/// Free disk below which a distillation is likely to fail: a checkpoint and a student of the default base take about half of it.
const LOW_DISK_BYTES: u64 = 2 << 30;
/// Free memory below which full fine-tuning of the default base does not fit.
const LOW_MEMORY_BYTES: u64 = 3 << 30;

/// What was looked at, for both kinds of output.
struct Findings<'a> {
    out: &'a Out,
    json: Map<String, Value>,
    problems: Vec<String>,
}

impl Findings<'_> {
    fn good(&self, name: &str, text: &str) {
        self.out.line(&format!("  ok  {name:<12} {text}"));
    }

    fn note(&self, name: &str, text: &str) {
        self.out.line(&format!("   ·  {name:<12} {text}"));
    }

    fn bad(&mut self, name: &str, text: String) {
        self.out.line(&format!("  !!  {name:<12} {text}"));
        self.problems.push(text);
    }
}

/// Prints every finding; problems are findings too and no failure of the command.
pub fn run(place: &Place, out: &Out) -> Result<(), Fail> {
    let mut found = Findings {
        out,
        json: Map::new(),
        problems: Vec::new(),
    };
    look_at_machine(place, &mut found);
    look_at_store(place, &mut found);
    let n = found.problems.len();
    out.line(match n {
        0 => "Nothing stands in the way.",
        1 => "One thing needs attention, marked !! above.",
        _ => "Some things need attention, marked !! above.",
    });
    let Findings {
        mut json, problems, ..
    } = found;
    json.insert("ok".into(), json!(problems.is_empty()));
    json.insert("problems".into(), json!(problems));
    out.result(&Value::Object(json));
    Ok(())
}

fn look_at_machine(place: &Place, found: &mut Findings) {
    let m = machine();
    let features = if m.features.is_empty() {
        "none of AVX2, AVX-512".into()
    } else {
        m.features.join(", ")
    };
    found.good(
        "processor",
        &format!("{}, {} cores ({features})", m.processor, m.cores),
    );
    found.good("kernels", &m.kernels);
    match Card::open(&place.device) {
        Ok(card) => {
            let info = card.info();
            found.good("card", &info.words());
            found.json.insert("card".into(), json!(info));
        }
        Err(why) => {
            let text = format!("none is used: {why} ({})", m.graphics);
            match why {
                DeviceError::Absent(_) | DeviceError::Unsupported | DeviceError::Off => {
                    found.note("card", &text)
                }
                // An object is there, so somebody wants it used.
                _ => found.bad("card", text),
            }
            found
                .json
                .insert("card".into(), json!({ "error": why.to_string() }));
        }
    }
    match m.memory_free_bytes {
        0 => found.note("memory", "the system does not say"),
        free if free < LOW_MEMORY_BYTES => {
            found.bad(
                "memory",
                format!("only {} free; training may not fit", bytes(free)),
            );
        }
        free => found.good(
            "memory",
            &format!("{} free of {}", bytes(free), bytes(m.memory_bytes)),
        ),
    }
    let disk = disk_free_bytes(&place.dir);
    match disk {
        None => found.note("disk", "the system does not say"),
        Some(free) if free < LOW_DISK_BYTES => {
            found.bad(
                "disk",
                format!(
                    "only {} free where the store is; a distillation may not fit",
                    bytes(free)
                ),
            );
        }
        Some(free) => found.good("disk", &format!("{} free where the store is", bytes(free))),
    }
    found.json.insert(
        "machine".into(),
        serde_json::to_value(&m).unwrap_or_default(),
    );
    found.json.insert("disk_free_bytes".into(), json!(disk));
}

fn look_at_store(place: &Place, found: &mut Findings) {
    let dir = place.dir.display().to_string();
    if !place.dir.is_dir() {
        found.note(
            "store",
            &format!("none at {dir} yet; a host or `locum episodes import` makes it"),
        );
        found
            .json
            .insert("store".into(), json!({ "dir": dir, "exists": false }));
        return;
    }
    let counts = match place.read().and_then(|store| Ok(store.counts(None)?)) {
        Ok(counts) => counts,
        Err(error) => {
            found.json.insert(
                "store".into(),
                json!({ "dir": dir, "exists": true, "error": error.to_string() }),
            );
            found.bad("store", error.to_string());
            return;
        }
    };
    found.good(
        "store",
        &format!(
            "{dir}: {} episodes, {} steps, {} successes, {} failures",
            counts.episodes, counts.steps, counts.successes, counts.failures
        ),
    );
    found.json.insert(
        "store".into(),
        json!({ "dir": dir, "exists": true, "counts": counts }),
    );
    match place.locum(None, false).map(|locum| locum.stats()) {
        Ok(stats) => {
            match &stats.base {
                Some(base) => match base_of(place) {
                    Ok(()) => found.good("model", base),
                    Err(error) => found.bad("model", error.to_string()),
                },
                None => found.bad(
                    "model",
                    "no base model; import one with `locum model import FILE_OR_DIR`".into(),
                ),
            }
            match stats.current_version {
                0 => found.note("student", "none has been promoted; the teacher answers"),
                version => found.good("student", &format!("student {version} answers")),
            }
            found.json.insert("base".into(), json!(stats.base));
            found
                .json
                .insert("current_version".into(), json!(stats.current_version));
        }
        Err(error) => found.bad("model", error.to_string()),
    }
}

/// Reads the default base whole, as opening does: a file that was changed is found here and not by the agent.
fn base_of(place: &Place) -> Result<(), RegistryError> {
    let registry = Registry::open(&place.dir)?;
    if let Some(dir) = registry.base_dir(None)? {
        registry.load_base(&dir)?;
    }
    Ok(())
}
