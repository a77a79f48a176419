//! The annotation files and the hooks' real arguments must not drift apart.

use std::collections::BTreeSet;
use std::path::Path;

use locum_core::episode::ToolCall;
use locum_core::policy::*;
use locum_core::view::View;
use locum_lua::surface::{types_lua, types_luau, RECORDS};
use serde::Serialize;

/// `UPDATE=1` writes the files instead.
fn same_as_file(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == text,
        "{name} is not what the table makes of it; run with UPDATE=1"
    );
}

#[test]
fn the_annotation_files_are_those_of_the_table() {
    same_as_file("types.lua", &types_lua());
    same_as_file("types.d.luau", &types_luau());
}

fn fields(value: &impl Serialize) -> BTreeSet<String> {
    serde_json::to_value(value)
        .unwrap()
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect()
}

#[test]
fn the_table_has_the_fields_of_the_real_values() {
    let real = [
        ("Student", fields(&StudentInfo::default())),
        ("Step", fields(&StepInfo::default())),
        ("ToolCall", fields(&ToolCall::default())),
        ("Reply", fields(&ReplyInfo::default())),
        ("Tool", fields(&ToolInfo::default())),
        ("Text", fields(&RedactInfo::default())),
        ("StepLine", fields(&StepLine::default())),
        ("Episode", fields(&EpisodeInfo::default())),
        ("World", fields(&WorldInfo::default())),
        ("Dataset", fields(&DatasetInfo::default())),
        ("Candidate", fields(&GateInfo::default())),
        ("Live", fields(&LiveInfo::default())),
        ("Choice", fields(&Choice::teacher(""))),
        (
            "Use",
            fields(&CurateVerdict {
                use_it: true,
                weight: 1.0,
                reason: String::new(),
            }),
        ),
        ("Knobs", fields(&RecipeKnobs::default())),
        ("Fast", fields(&FastInfo::default())),
        ("Stored", fields(&RetainInfo::default())),
        ("Event", fields(&EventInfo::default())),
        ("Learn", fields(&FastVerdict::as_trained())),
        (
            "View",
            fields(&View {
                turns: true,
                ..View::default()
            }),
        ),
        ("CurateSettings", fields(&CurateSettings::default())),
        ("GateSettings", fields(&GateSettings::default())),
        ("ServeSettings", fields(&ServeSettings::default())),
        ("Settings", fields(&Settings::default())),
    ];
    for (name, real) in &real {
        let record = RECORDS
            .iter()
            .find(|record| record.name == *name)
            .unwrap_or_else(|| panic!("{name} is not in the table"));
        let listed: BTreeSet<String> = record
            .fields
            .iter()
            .map(|field| field.0.to_owned())
            .collect();
        assert_eq!(&listed, real, "{name}");
    }
    // `Label` has a short form (`success`) that the Rust value has not.
    let rest: Vec<_> = RECORDS
        .iter()
        .map(|r| r.name)
        .filter(|name| real.iter().all(|(real, _)| real != name))
        .collect();
    assert_eq!(rest, ["Label"]);
}

/// The guide for authors names every hook, every field of the two declarations and every library member that is missing, and
/// its example loads.
#[test]
fn the_guide_names_the_whole_surface_and_its_example_loads() {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/policy.md");
    let guide = std::fs::read_to_string(guide).unwrap();
    let example = guide
        .split("```lua\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .unwrap();
    let policy =
        locum_lua::LuaPolicy::from_source(example, "guide.lua", Default::default()).unwrap();
    assert_eq!(policy.settings().gate.margin, 0.03);
    for hook in locum_lua::hooks::Hook::ALL {
        let row = guide
            .lines()
            .find(|l| l.starts_with(&format!("| `{}(", hook.name())));
        assert!(row.is_some(), "{} has no row", hook.name());
    }
    let defaults = [
        serde_json::to_value(View::default()).unwrap(),
        serde_json::to_value(CurateSettings::default()).unwrap(),
        serde_json::to_value(GateSettings::default()).unwrap(),
    ];
    for (field, value) in defaults.iter().flat_map(|d| d.as_object().unwrap()) {
        let value = match value.as_f64() {
            Some(number) => number.to_string(),
            None => format!("`{value}`"),
        };
        let row = format!("| `{field}` | {value} |");
        assert!(guide.contains(&row), "the guide has no row `{row}`");
    }
}
