//! The whole surface given to scripts, written down once: what hooks receive and return. The annotation files for editors
//! (`types.lua` for LuaLS, `types.d.luau` for luau-lsp) and the samples that `check` calls hooks with are made from it.

use crate::hooks::Hook;

/// One table type: its name, what it is, and its fields.
pub struct Record {
    pub name: &'static str,
    pub doc: &'static str,
    pub fields: &'static [Field],
}

/// A field's name, its type in Luau syntax (`?` = may be absent), and what it is.
pub type Field = (&'static str, &'static str, &'static str);

/// A hook's argument type and its return values, in Luau syntax.
pub struct Signature {
    pub hook: Hook,
    pub argument: (&'static str, &'static str),
    pub returns: &'static str,
    pub doc: &'static str,
}

/// Arguments of hooks, and tables that a policy declares or returns.
pub const RECORDS: &[Record] = &[
    Record {
        name: "Student",
        doc: "The student that is offered for a step.",
        fields: &[
            ("id", "string", "content hash"),
            ("version", "number", "1, 2, ... by creation"),
            (
                "live_success",
                "number?",
                "share of live episodes it won; absent before the first outcome",
            ),
            ("live_episodes", "number", "live episodes with an outcome"),
            (
                "held_out_exact",
                "number?",
                "share of held-out steps it answered exactly like the teacher",
            ),
        ],
    },
    Record {
        name: "Step",
        doc: "Argument of decide.",
        fields: &[
            ("task", "string", "task id"),
            ("domain", "string", "the host's word for a kind of task"),
            (
                "turn",
                "number",
                "agent turns already played in the episode",
            ),
            ("tools", "{string}", "names of the request's tools"),
            ("prompt_bytes", "number", "bytes of the request's messages"),
            (
                "novelty",
                "number",
                "0 = every tool was in the training set, 1 = none was",
            ),
            ("deadline_ms", "number", "time the host gives"),
            ("student", "Student?", "absent when none can be offered"),
            ("stage", "string", "shadow, canary, promoted or pinned"),
        ],
    },
    Record {
        name: "ToolCall",
        doc: "One tool call of a reply.",
        fields: &[
            ("id", "string", ""),
            ("name", "string", ""),
            ("arguments", "any", "as parsed from JSON; null is absent"),
        ],
    },
    Record {
        name: "Reply",
        doc: "Argument of accept.",
        fields: &[
            ("task", "string", "task id"),
            ("domain", "string", ""),
            ("text", "string", ""),
            ("tool_calls", "{ToolCall}", ""),
            (
                "mean_logprob",
                "number",
                "of the tokens that the grammar left open",
            ),
            (
                "min_prob",
                "number",
                "probability of the least likely of them",
            ),
            ("tokens", "number", ""),
            ("latency_ms", "number", ""),
        ],
    },
    Record {
        name: "Tool",
        doc: "Argument of allow_tool.",
        fields: &[
            ("task", "string", "task id"),
            ("domain", "string", ""),
            ("name", "string", "the tool"),
            ("arguments", "any", "as parsed from JSON; null is absent"),
        ],
    },
    Record {
        name: "Text",
        doc: "Argument of redact.",
        fields: &[
            (
                "role",
                "string",
                "system, user, assistant, tool or arguments",
            ),
            ("tool", "string?", "the tool that wrote it"),
            ("content", "string", "at most 1 MiB"),
        ],
    },
    Record {
        name: "StepLine",
        doc: "A step of an episode in one line.",
        fields: &[
            ("index", "number", ""),
            ("source", "string", "system, user or agent"),
            ("call", "string?", "name and arguments of the first call"),
            ("is_error", "boolean", "its tool refused it"),
            ("masked", "boolean", "carries no loss"),
        ],
    },
    Record {
        name: "Episode",
        doc: "Argument of label and curate.",
        fields: &[
            ("id", "string", ""),
            ("task", "string", "task id"),
            ("domain", "string", ""),
            ("source_format", "string", "empty for recorded episodes"),
            ("teacher", "boolean", "a teacher played in it"),
            ("steps", "{StepLine}", ""),
            ("agent_steps", "number", ""),
            (
                "error_results",
                "number",
                "agent steps whose tool refused them",
            ),
            ("repeated_calls", "number", "calls equal to the one before"),
            ("masked_steps", "number", ""),
            (
                "status",
                "string",
                "success, partial, failure, aborted or unknown",
            ),
            ("score", "number?", "the host's score"),
            ("integrity_flags", "{string}", "empty for a sound outcome"),
            ("tags", "{string}", ""),
            ("cost_usd", "number", ""),
        ],
    },
    Record {
        name: "World",
        doc: "Argument of schedule.",
        fields: &[
            ("episodes", "number", ""),
            ("successes", "number", ""),
            ("new_successes", "number", "since the last job began"),
            ("new_episodes", "number", ""),
            ("hours_since_job", "number?", "absent before the first"),
            ("job_running", "boolean", ""),
            (
                "trial_running",
                "boolean",
                "a candidate is in shadow or canary",
            ),
            ("has_base", "boolean", "there is a model to train"),
            ("promoted", "boolean", "a student is in service"),
            ("free_memory_mb", "number", ""),
            ("load", "number", "of the machine, in cores"),
        ],
    },
    Record {
        name: "Dataset",
        doc: "Argument of recipe.",
        fields: &[
            ("episodes", "number", ""),
            ("samples", "number", ""),
            ("tokens", "number", ""),
            ("target_tokens", "number", "tokens that carry loss"),
            ("tasks", "number", ""),
            ("num_hidden_layers", "number", "of the base"),
            ("threads", "number", "for training"),
        ],
    },
    Record {
        name: "Candidate",
        doc: "Argument of gate.",
        fields: &[
            (
                "stage",
                "string",
                "offline, shadow or canary: the stage just finished",
            ),
            ("candidate", "string", "student id"),
            (
                "held_out_exact",
                "number",
                "share of held-out steps with the teacher's exact call",
            ),
            ("held_out_loss", "number", ""),
            ("base_exact", "number", "the same share for the base"),
            ("shadow_agreement", "number?", ""),
            ("teacher_success", "number?", ""),
            ("teacher_episodes", "number", ""),
            ("student_success", "number?", ""),
            ("student_episodes", "number", ""),
            ("verdict", "string", "what the built-in rules say"),
            ("reasons", "{string}", "and why"),
        ],
    },
    Record {
        name: "Live",
        doc: "Argument of rollback.",
        fields: &[
            ("student", "string", "student id"),
            ("episodes", "number", "live episodes since the promotion"),
            ("success", "number", "share of them won"),
            ("teacher_success", "number", "the teacher's in the canary"),
            ("deferrals", "number", "steps left to the teacher"),
            ("steps", "number", ""),
            ("built_in", "boolean", "what the built-in test says"),
        ],
    },
    Record {
        name: "Fast",
        doc: "Argument of fast_weights.",
        fields: &[
            ("task", "string", "task id"),
            ("domain", "string", ""),
            (
                "stage",
                "string",
                "episode before a prompt is read, chunk behind a chunk",
            ),
            ("student", "string", "student id"),
            ("version", "number", ""),
            ("position", "number", "tokens read"),
            ("chunk", "number", "tokens of a chunk"),
            (
                "drift",
                "number",
                "largest relative change of a layer since the episode began",
            ),
            (
                "max_drift",
                "number?",
                "the drift at which it is undone and the teacher asked",
            ),
            (
                "loss",
                "number?",
                "mean negative log-likelihood of the chunk just read",
            ),
            ("loss_before", "number?", "the same of the chunks before it"),
        ],
    },
    Record {
        name: "Stored",
        doc: "Argument of retain.",
        fields: &[
            ("id", "string", ""),
            ("task", "string", "task id"),
            ("domain", "string", ""),
            ("scope", "string", "empty for episodes without one"),
            ("source_format", "string", "live for recorded episodes"),
            (
                "status",
                "string",
                "success, partial, failure, aborted or unknown",
            ),
            ("tags", "{string}", ""),
            ("age_days", "number", "since it began or was imported"),
            ("steps", "number", ""),
            ("bytes", "number", "of the episode as JSON"),
            ("incomplete", "boolean", "a step was lost"),
            ("learned", "boolean", "a student learned from it"),
        ],
    },
    Record {
        name: "Event",
        doc: "Argument of on_event.",
        fields: &[
            (
                "kind",
                "string",
                "job_state, student_swapped, rolled_back, store_trouble, policy_loaded, fault, fast_weights, forgotten or hook_off",
            ),
            ("subject", "number", "job number or student version, by kind"),
            ("number", "number", ""),
            ("detail", "any", "as parsed from JSON; null is absent"),
        ],
    },
    Record {
        name: "Choice",
        doc: "What decide and accept may return instead of two strings.",
        fields: &[
            ("who", "string", "\"student\" (\"keep\") or \"teacher\""),
            ("reason", "string?", ""),
            ("temperature", "number?", "0 to 2"),
            ("max_tokens", "number?", "1 to 4096"),
        ],
    },
    Record {
        name: "Label",
        doc: "What label may return.",
        fields: &[
            (
                "status",
                "string?",
                "success, partial, failure, aborted or unknown",
            ),
            ("success", "boolean?", "short for status"),
            ("score", "number?", ""),
            ("tags", "{string}?", ""),
        ],
    },
    Record {
        name: "Use",
        doc: "What curate may return instead of a boolean.",
        fields: &[
            ("use", "boolean", ""),
            ("weight", "number?", "0 to 100, 1 unless given"),
            ("reason", "string?", ""),
        ],
    },
    Record {
        name: "Learn",
        doc: "What fast_weights may return instead of a boolean.",
        fields: &[
            ("on", "boolean?", "true unless given"),
            (
                "step",
                "number?",
                "factor on the trained step size, 0 to 10; 1 unless given",
            ),
            ("reset", "boolean?", "back to the trained weights"),
            ("reason", "string?", ""),
        ],
    },
    Record {
        name: "Knobs",
        doc: "What recipe may return; absent means the built-in value, and values are clamped.",
        fields: &[
            ("method", "string?", "upper, lora or full"),
            ("tokens", "number?", ""),
            ("max_seconds", "number?", ""),
            ("epochs", "number?", ""),
            ("lr", "number?", ""),
            ("rank", "number?", "of lora"),
            ("alpha", "number?", "of lora"),
            ("upper_layers", "number?", "layers trained by upper"),
            ("batch_tokens", "number?", ""),
            ("warmup_steps", "number?", ""),
            ("weight_decay", "number?", ""),
            (
                "trim_after",
                "number?",
                "share of the job after which unlikely targets are left out",
            ),
            (
                "trim_below",
                "number?",
                "mean probability below which a target is unlikely",
            ),
            ("patience", "number?", ""),
            ("seed", "number?", ""),
            (
                "compute",
                "string?",
                "bf16 or f32: the numbers of products in training",
            ),
            (
                "memory_mib",
                "number?",
                "memory a training may take; with less, more is computed twice",
            ),
            (
                "ttt",
                "string?",
                "layers that learn while the student reads, and how they begin: published, next_token or off",
            ),
            ("ttt_every", "number?", "every which layer learns"),
            ("ttt_chunk", "number?", "tokens of a chunk"),
            ("ttt_lr", "number?", "step size of the updates while reading"),
            (
                "ttt_rate",
                "number?",
                "learning rate of their filters and projections",
            ),
            (
                "ttt_from",
                "number?",
                "share of the training before they begin to learn",
            ),
            (
                "ttt_decay",
                "number?",
                "share that a chunk's end keeps of what was written so far",
            ),
            (
                "ttt_delta",
                "number?",
                "strength of a delta rule, in place of a decay",
            ),
        ],
    },
    Record {
        name: "View",
        doc: "How the student sees an episode.",
        fields: &[
            ("system", "string?", "text of the system turn"),
            (
                "host_system",
                "boolean?",
                "whether the host's system prompt follows",
            ),
            ("tools", "string?", "none, signatures or described"),
            ("goal", "string?", "first, last, both or none"),
            ("steps_back", "number?", "earlier agent turns shown"),
            ("older", "string?", "call, values or call_and_line"),
            ("full_steps", "number?", "of which so many are shown whole"),
            ("turns", "boolean?", "the history as turns of the chat, for whole episodes in one text"),
            ("observation_chars", "number?", ""),
            ("focus", "number?", "clauses that share words with the goal"),
            ("focus_overlap", "number?", "words they must share"),
            ("max_tokens", "number?", "of the whole prompt"),
        ],
    },
    Record {
        name: "CurateSettings",
        doc: "Rules of curation that need no code.",
        fields: &[
            ("max_per_task", "number?", ""),
            (
                "max_copies",
                "number?",
                "most kept episodes with the same words and actions",
            ),
            ("held_out", "number?", "share of task groups"),
            (
                "near_duplicate",
                "number?",
                "similarity from which an episode is a duplicate",
            ),
            ("mask_loops", "boolean?", ""),
            ("mask_repeats", "boolean?", ""),
            ("mask_errors", "boolean?", ""),
            ("mask_noops", "boolean?", ""),
            ("mask_derails", "boolean?", ""),
            (
                "derail_support",
                "number?",
                "times an action must have been seen to outvote another",
            ),
            (
                "derail_tolerance",
                "number?",
                "share by which a step may be worse than the best known",
            ),
            ("max_length_ratio", "number?", "0 = off"),
        ],
    },
    Record {
        name: "GateSettings",
        doc: "Numbers of the gate.",
        fields: &[
            ("margin", "number?", "of non-inferiority, as a share"),
            ("alpha", "number?", "rate of wrong promotions"),
            ("min_exact", "number?", ""),
            ("min_held_out_steps", "number?", ""),
            ("shadow_steps", "number?", ""),
            ("max_shadow_failures", "number?", ""),
            ("canary_share", "number?", ""),
            ("min_canary", "number?", ""),
            ("max_canary", "number?", ""),
            ("min_slice", "number?", ""),
            ("keep_teacher", "number?", ""),
        ],
    },
    Record {
        name: "ServeSettings",
        doc: "How a student plays.",
        fields: &[(
            "avoid_repeats",
            "boolean?",
            "a call that changed nothing is not made again at once",
        )],
    },
    Record {
        name: "Settings",
        doc: "Fixed settings of a policy.",
        fields: &[
            ("curate", "CurateSettings?", ""),
            ("gate", "GateSettings?", ""),
            ("serve", "ServeSettings?", ""),
        ],
    },
];

pub const SIGNATURES: &[Signature] = &[
    Signature {
        hook: Hook::Decide,
        argument: ("step", "Step"),
        returns: "string | Choice, string?",
        doc: "Who plays this step?",
    },
    Signature {
        hook: Hook::Accept,
        argument: ("reply", "Reply"),
        returns: "string | Choice, string?",
        doc: "Keep the student's finished reply?",
    },
    Signature {
        hook: Hook::AllowTool,
        argument: ("call", "Tool"),
        returns: "boolean | string, string?",
        doc: "May this call of the student's leave us?",
    },
    Signature {
        hook: Hook::Redact,
        argument: ("text", "Text"),
        returns: "string?",
        doc: "The text to record; nil drops it.",
    },
    Signature {
        hook: Hook::Label,
        argument: ("episode", "Episode"),
        returns: "Label?",
        doc: "Judges an episode at its end.",
    },
    Signature {
        hook: Hook::Curate,
        argument: ("episode", "Episode"),
        returns: "boolean | Use, string?",
        doc: "May the episode enter a dataset?",
    },
    Signature {
        hook: Hook::Schedule,
        argument: ("world", "World"),
        returns: "string, string?",
        doc: "Is it time to distil?",
    },
    Signature {
        hook: Hook::Recipe,
        argument: ("dataset", "Dataset"),
        returns: "Knobs?",
        doc: "Knobs of a job.",
    },
    Signature {
        hook: Hook::Gate,
        argument: ("report", "Candidate"),
        returns: "string, string?",
        doc: "A word on a candidate.",
    },
    Signature {
        hook: Hook::Rollback,
        argument: ("live", "Live"),
        returns: "boolean?, string?",
        doc: "Take the promoted student back?",
    },
    Signature {
        hook: Hook::FastWeights,
        argument: ("fast", "Fast"),
        returns: "boolean? | Learn?, string?",
        doc: "How does the student go on learning while it reads?",
    },
    Signature {
        hook: Hook::Retain,
        argument: ("episode", "Stored"),
        returns: "string",
        doc: "What becomes of a stored episode: keep, drop or anonymise?",
    },
    Signature {
        hook: Hook::OnEvent,
        argument: ("event", "Event"),
        returns: "",
        doc: "Something has happened.",
    },
];

/// Annotations for LuaLS.
pub fn types_lua() -> String {
    let mut out = String::from("---@meta\n-- Generated from lua/src/surface.rs; `UPDATE=1 cargo test -p locum-lua` writes it again.\n");
    for record in RECORDS {
        out += &format!("\n---{}\n---@class locum.{}\n", record.doc, record.name);
        for (name, ty, doc) in record.fields {
            let (ty, optional) = luals(ty);
            out += &format!(
                "---@field {name}{} {ty}{}\n",
                if optional { "?" } else { "" },
                spaced(doc)
            );
        }
    }
    out +=
        "\n---What a policy file returns. Every field may be left out.\n---@class locum.Policy\n";
    out += "---@field view? locum.View\n---@field settings? locum.Settings\n---@field selftest? fun(): boolean?\n";
    for s in SIGNATURES {
        let returns: Vec<String> = match s.returns {
            "" => vec!["nil".into()],
            some => some.split(", ").map(luals_union).collect(),
        };
        out += &format!(
            "---@field {}? fun({}: locum.{}): {} {}\n",
            s.hook.name(),
            s.argument.0,
            s.argument.1,
            returns.join(", "),
            s.doc
        );
    }
    out += "\n---@class locum\nlocum = {}\n\n---A number in [0, 1) that depends on nothing but its arguments: for stable sampling.\n";
    out += "---@param seed string|integer\n---@param text string\n---@return number\nfunction locum.hash(seed, text) end\n";
    out
}

/// Definitions for luau-lsp.
pub fn types_luau() -> String {
    let mut out = String::from("-- Generated from lua/src/surface.rs; `UPDATE=1 cargo test -p locum-lua` writes it again.\n");
    for record in RECORDS {
        out += &format!("\n-- {}\nexport type {} = {{\n", record.doc, record.name);
        for (name, ty, doc) in record.fields {
            let doc = if doc.is_empty() {
                String::new()
            } else {
                format!(" -- {doc}")
            };
            out += &format!("  {name}: {ty},{doc}\n");
        }
        out += "}\n";
    }
    out += "\n-- What a policy file returns. Every field may be left out.\nexport type Policy = {\n  view: View?,\n  settings: Settings?,\n";
    for s in SIGNATURES {
        out += &format!(
            "  {}: (({}: {}) -> ({}))?, -- {}\n",
            s.hook.name(),
            s.argument.0,
            s.argument.1,
            s.returns,
            s.doc
        );
    }
    out += "  selftest: (() -> boolean?)?,\n}\n\ndeclare locum: {\n  -- A number in [0, 1) that depends on nothing but its arguments.\n";
    out += "  hash: (seed: string | number, text: string) -> number,\n}\n";
    out
}

fn spaced(doc: &str) -> String {
    if doc.is_empty() {
        String::new()
    } else {
        format!(" {doc}")
    }
}

/// A Luau type as LuaLS writes it, and whether it may be absent.
fn luals(ty: &str) -> (String, bool) {
    let (ty, optional) = ty.strip_suffix('?').map_or((ty, false), |ty| (ty, true));
    let plain = |ty: &str| match ty {
        "string" | "number" | "boolean" | "any" => ty.to_owned(),
        record => format!("locum.{record}"),
    };
    match ty.strip_prefix('{').and_then(|ty| ty.strip_suffix('}')) {
        Some(item) => (format!("{}[]", plain(item)), optional),
        None => (plain(ty), optional),
    }
}

fn luals_union(ty: &str) -> String {
    let parts = ty.split(" | ").map(|part| {
        let (ty, optional) = luals(part);
        if optional {
            format!("{ty}?")
        } else {
            ty
        }
    });
    parts.collect::<Vec<_>>().join("|")
}
