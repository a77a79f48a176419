//! One sandboxed Lua state with a policy loaded into it.
//!
//! The surface is an allow-list ([`ALLOWED`]): whatever else a state has when it is made is removed, then the state is frozen,
//! then the policy is run. Luau's compiler turns calls of well-known functions into instructions that work without looking the
//! function up, so removing a global is not enough: the compiler is told about those that are gone ([`REMOVED`]).

use locum_core::threads::spawn_quiet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use std::time::{Duration, Instant};

use locum_core::limits;
use locum_core::policy::StepInfo;
use mlua::chunk::{ChunkMode, Compiler};
use mlua::{Function, Lua, LuaOptions, MultiValue, StdLib, Table, Value, Variadic};
use sha2::{Digest, Sha256};

use crate::convert::Steps;
use crate::hooks::{At, Failure, Hook, LOAD_LIMIT};
use crate::watchdog::{TimeLimit, Watch, Watchdog};
use crate::PolicyError;

/// Everything a policy can name: globals (first row) and members of the libraries.
pub const ALLOWED: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "assert",
            "error",
            "ipairs",
            "next",
            "pairs",
            "pcall",
            "print",
            "rawequal",
            "rawget",
            "rawlen",
            "select",
            "setmetatable",
            "tonumber",
            "tostring",
            "type",
            "typeof",
            "xpcall",
        ],
    ),
    (
        "bit32",
        &[
            "arshift", "band", "bnot", "bor", "btest", "bxor", "byteswap", "countlz", "countrz",
            "extract", "lrotate", "lshift", "replace", "rrotate", "rshift",
        ],
    ),
    ("locum", &["hash"]),
    (
        "math",
        &[
            "abs", "acos", "asin", "atan", "atan2", "ceil", "clamp", "cos", "cosh", "deg", "exp",
            "floor", "fmod", "frexp", "huge", "isfinite", "isinf", "isnan", "ldexp", "lerp", "log",
            "log10", "map", "max", "min", "modf", "pi", "pow", "rad", "round", "sign", "sin",
            "sinh", "sqrt", "tan", "tanh",
        ],
    ),
    (
        "string",
        &[
            "byte", "char", "find", "format", "gmatch", "gsub", "len", "lower", "match", "pack",
            "packsize", "rep", "reverse", "split", "sub", "unpack", "upper",
        ],
    ),
    (
        "table",
        &[
            "clear", "clone", "concat", "create", "find", "freeze", "insert", "isfrozen", "move",
            "pack", "remove", "sort", "unpack",
        ],
    ),
    (
        "utf8",
        &["char", "charpattern", "codepoint", "codes", "len", "offset"],
    ),
];

/// Names that scripts of other hosts know and a policy does not have. The compiler is told that they are no built-ins, so that
/// it neither inlines nor imports them; `policy check` finds their uses.
pub const REMOVED: &[&str] = &[
    "_G",
    "_VERSION",
    "buffer",
    "collectgarbage",
    "coroutine",
    "debug",
    "dofile",
    "gcinfo",
    "getfenv",
    "getmetatable",
    "integer",
    "io",
    "load",
    "loadfile",
    "loadstring",
    "module",
    "newproxy",
    "os",
    "package",
    "rawset",
    "require",
    "setfenv",
    "unpack",
    "vector",
];

/// Wall-clock time that compiling may take. Luau promises no bound and its compiler cannot be interrupted.
const COMPILE_LIMIT: Duration = Duration::from_secs(5);
/// Byte pairs that one search over a string may compare (about 2.5 ms), and the same for each byte of content to redact.
const WORK: usize = 2 << 20;
const WORK_PER_REDACTED_BYTE: usize = 128;
/// Lines that a policy may print each second; more are counted and dropped.
const PRINTS_PER_SECOND: u64 = 10;
const MAX_PRINT_BYTES: usize = 500;

/// A policy's compiled source: what is needed to make another state of it.
pub struct Program {
    pub name: String,
    bytecode: Vec<u8>,
    memory_bytes: usize,
    printer: Printer,
}

impl Program {
    /// Checks the size, compiles.
    ///
    /// # Errors
    /// [`PolicyError::TooLarge`], [`PolicyError::Binary`], [`PolicyError::Syntax`] with file and line,
    /// [`PolicyError::CompileTime`].
    pub fn compile(
        source: &str,
        name: &str,
        memory_bytes: usize,
        printer: Printer,
    ) -> Result<Self, PolicyError> {
        let name = clean_name(name);
        if source.len() > limits::MAX_POLICY_BYTES {
            return Err(PolicyError::TooLarge {
                name,
                bytes: source.len(),
            });
        }
        // Compiled Luau starts with a small version number, compiled Lua with an escape. Our compiler would refuse both as bad
        // syntax; this says it better.
        if source
            .bytes()
            .next()
            .is_some_and(|b| b < b' ' && !b"\t\r\n".contains(&b))
        {
            return Err(PolicyError::Binary { name });
        }
        let text = source.strip_prefix('\u{feff}').unwrap_or(source).to_owned();
        let (send, receive) = mpsc::channel();
        let worker = spawn_quiet("locum-lua-compile", move || {
            let removed = REMOVED.iter().map(|name| name.to_string());
            let compiler = Compiler::new()
                .set_optimization_level(1)
                .set_debug_level(1)
                .set_mutable_globals(removed);
            // The receiver is gone if this took too long.
            let _ = send.send(compiler.compile(text.as_bytes()));
        });
        worker.map_err(|e| PolicyError::State {
            name: name.clone(),
            message: e.to_string(),
        })?;
        let bytecode = match receive.recv_timeout(COMPILE_LIMIT) {
            Ok(Ok(bytecode)) => bytecode,
            Ok(Err(mlua::Error::SyntaxError { message, .. })) => {
                // `:12: message`, the compiler does not know the file's name.
                let message = message.trim_start_matches(':');
                return Err(PolicyError::Syntax {
                    message: one_line(&format!("{name}:{message}")),
                });
            }
            Ok(Err(other)) => {
                return Err(PolicyError::Syntax {
                    message: one_line(&format!("{name}: {other}")),
                })
            }
            Err(_) => {
                return Err(PolicyError::CompileTime {
                    name,
                    seconds: COMPILE_LIMIT.as_secs(),
                })
            }
        };
        Ok(Self {
            name,
            bytecode,
            memory_bytes,
            printer,
        })
    }
}

/// Where `print` goes: log lines, rate-limited, or a list that `policy check` shows.
#[derive(Clone)]
pub enum Printer {
    Log(Arc<PrintRate>),
    List(Arc<Mutex<Vec<String>>>),
}

/// How much a policy has printed in the current second.
pub struct PrintRate {
    start: Instant,
    /// Second since `start` in the upper half, lines printed in it in the lower.
    lines: AtomicU64,
}

impl Default for PrintRate {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            lines: AtomicU64::new(0),
        }
    }
}

impl PrintRate {
    fn allows(&self) -> bool {
        let second = self.start.elapsed().as_secs() << 32;
        let update = |old: u64| {
            Some(if old >> 32 == second >> 32 {
                old.saturating_add(1)
            } else {
                second + 1
            })
        };
        let before = self
            .lines
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, update)
            .unwrap_or(0);
        before >> 32 != second >> 32 || (before & 0xffff_ffff) < PRINTS_PER_SECOND
    }
}

impl Printer {
    fn print(&self, name: &str, line: String) {
        match self {
            Printer::Log(rate) => {
                if rate.allows() {
                    tracing::info!(target: "locum::policy", policy = name, "{line}");
                }
            }
            Printer::List(lines) => {
                let mut lines = lines.lock().unwrap_or_else(|e| e.into_inner());
                if lines.len() < 100 {
                    lines.push(line);
                }
            }
        }
    }
}

/// A frozen state with the policy's hooks. Used by one thread at a time.
pub struct Sandbox {
    watch: Watch,
    hooks: [Option<Function>; Hook::ALL.len()],
    /// The table that the policy file returned.
    pub policy: Table,
    bounds: Table,
    /// Calls a hook with its argument frozen.
    enter: Function,
    /// Makes arguments of `decide`.
    steps: Steps,
    name: String,
    memory_bytes: usize,
    pub calls: u32,
    lua: Lua,
}

impl Sandbox {
    /// Builds a state, freezes it and runs the policy file in it.
    ///
    /// # Errors
    /// [`PolicyError::Load`] if the file's top level raises, is late, or is too large; [`PolicyError::Shape`] if it does not
    /// return a table of the right shape; [`PolicyError::State`] if there is no memory for a state.
    pub fn new(program: &Program, watchdog: &Watchdog) -> Result<Self, PolicyError> {
        let name = &program.name;
        let state_error = |e: mlua::Error| PolicyError::State {
            name: name.clone(),
            message: one_line(&e.to_string()),
        };
        let Frozen {
            lua,
            bounds,
            enter,
            step,
        } = frozen_state(program).map_err(state_error)?;
        let watch = watchdog.watch(&lua).map_err(state_error)?;
        let load_error = |message: String| PolicyError::Load { message };
        let chunk = lua
            .load(&program.bytecode[..])
            .set_mode(ChunkMode::Binary)
            .set_name(format!("={name}"))
            .into_function()
            .map_err(|e| load_error(format!("{name}: {}", one_line(&e.to_string()))))?;
        let (result, stopped) = watch.run(LOAD_LIMIT, || chunk.call::<MultiValue>(()));
        if let Some(stopped) = stopped {
            let at = At::find(
                name,
                &result.err().map(|e| e.to_string()).unwrap_or_default(),
            );
            return Err(load_error(Failure::TooLong { at, stopped }.to_string()));
        }
        let returned = result.map_err(|e| load_error(described(name, &e)))?;
        let policy = match returned.front() {
            Some(Value::Table(table)) => table.clone(),
            other => {
                let found = other.map_or("nothing", crate::convert::type_name);
                return Err(PolicyError::Shape {
                    message: format!("{name} must return one table, found {found}"),
                });
            }
        };
        // From here on a hook that forgets `local` fails instead of keeping a value for its next call.
        lua.globals().set_readonly(true);
        policy.set_readonly(true);
        let hooks = crate::convert::hooks_of(name, &policy)?;
        Ok(Self {
            watch,
            hooks,
            policy,
            bounds,
            enter,
            steps: Steps::new(step),
            name: name.clone(),
            memory_bytes: program.memory_bytes,
            calls: 0,
            lua,
        })
    }

    pub fn lua(&self) -> &Lua {
        &self.lua
    }

    pub fn has(&self, hook: Hook) -> bool {
        self.hooks[hook as usize].is_some()
    }

    /// Calls a hook that the policy has, with `argument` as its one argument; `bytes` is the size of its content.
    pub fn call(
        &mut self,
        hook: Hook,
        argument: Table,
        bytes: usize,
    ) -> Result<MultiValue, Failure> {
        let Some(function) = &self.hooks[hook as usize] else {
            return Ok(MultiValue::new());
        };
        let raised = hook == Hook::Redact && bytes * WORK_PER_REDACTED_BYTE > WORK;
        if raised {
            self.set_work(bytes * WORK_PER_REDACTED_BYTE)?;
        }
        let result = self.run(&self.enter, (function, argument), hook.limit(bytes));
        if raised {
            self.set_work(WORK)?;
        }
        self.calls += 1;
        result
    }

    /// The argument of `decide` as a table.
    ///
    /// # Errors
    /// [`Failure::Memory`] where the state has no room for it.
    pub fn step(&mut self, step: &StepInfo) -> Result<Table, Failure> {
        self.steps.table(&self.lua, step)
    }

    /// Calls any function of this state under a time limit.
    pub fn run(
        &self,
        function: &Function,
        argument: impl mlua::IntoLuaMulti,
        limit: TimeLimit,
    ) -> Result<MultiValue, Failure> {
        let (result, stopped) = self
            .watch
            .run(limit, || function.call::<MultiValue>(argument));
        let text = |e: &mlua::Error| e.to_string();
        match (result, stopped) {
            (Ok(values), None) => Ok(values),
            (Ok(_), Some(stopped)) => Err(Failure::TooLong {
                at: At::default(),
                stopped,
            }),
            (Err(e), Some(stopped)) => Err(Failure::TooLong {
                at: At::find(&self.name, &text(&e)),
                stopped,
            }),
            (Err(e), None) => {
                let at = At::find(&self.name, &text(&e));
                Err(if is_memory(&e) {
                    Failure::Memory { at }
                } else {
                    Failure::Raised {
                        at,
                        text: plain(&e),
                    }
                })
            }
        }
    }

    /// After a hook outside the path of a step: lets the collector do a piece of its work.
    pub fn rest(&self) {
        // An error here is one of a finalizer, and a sandboxed state has none.
        let _ = self.lua.gc_step();
    }

    /// Worn out: replaced by a fresh state, so that what a policy keeps in upvalues does not grow for ever.
    pub fn is_stale(&self, calls: u32) -> bool {
        self.calls >= calls || self.lua.used_memory() > self.memory_bytes / 2
    }

    fn set_work(&self, work: usize) -> Result<(), Failure> {
        self.bounds
            .raw_set("work", work)
            .map_err(|e| Failure::Argument(one_line(&e.to_string())))
    }
}

/// A state before the policy is run in it, with what its prelude hands to Rust.
struct Frozen {
    lua: Lua,
    bounds: Table,
    enter: Function,
    step: Function,
}

/// A state with the allowed surface and nothing else, frozen, with its memory limit.
fn frozen_state(program: &Program) -> mlua::Result<Frozen> {
    let libraries = StdLib::TABLE | StdLib::STRING | StdLib::MATH | StdLib::BIT | StdLib::UTF8;
    let lua = Lua::new_with(libraries, LuaOptions::new().catch_rust_panics(true))?;
    let globals = lua.globals();
    keep_only_allowed(&globals)?;
    let (name, printer) = (program.name.clone(), program.printer.clone());
    let print = lua.create_function(move |_, values: Variadic<Value>| {
        let words: Vec<String> = values.iter().map(printed).collect();
        printer.print(&name, tidy(&words.join(" "), MAX_PRINT_BYTES));
        Ok(())
    })?;
    globals.raw_set("print", print)?;
    let locum = lua.create_table()?;
    locum.raw_set(
        "hash",
        lua.create_function(|_, (seed, text): (mlua::LuaString, mlua::LuaString)| {
            Ok(hash(&seed.as_bytes(), &text.as_bytes()))
        })?,
    )?;
    globals.raw_set("locum", locum)?;
    let bounds = lua.create_table()?;
    bounds.raw_set("work", WORK)?;
    let (enter, step) = lua
        .load(include_str!("prelude.lua"))
        .set_name("=[locum]")
        .call::<(Function, Function)>(bounds.clone())?;
    lua.sandbox(true)?;
    lua.set_memory_limit(program.memory_bytes)?;
    Ok(Frozen {
        lua,
        bounds,
        enter,
        step,
    })
}

fn keep_only_allowed(globals: &Table) -> mlua::Result<()> {
    let names = |table: &Table| {
        table
            .pairs::<Value, Value>()
            .collect::<mlua::Result<Vec<_>>>()
    };
    let allowed = |library: &str, name: &Value| {
        let members = ALLOWED
            .iter()
            .find(|(l, _)| *l == library)
            .map_or(&[][..], |(_, m)| m);
        name.as_string()
            .is_some_and(|s| members.iter().any(|m| s.as_bytes() == m.as_bytes()))
    };
    for (name, value) in names(globals)? {
        match &value {
            Value::Table(library)
                if name
                    .as_string()
                    .is_some_and(|s| ALLOWED.iter().any(|(l, _)| s.as_bytes() == l.as_bytes())) =>
            {
                let library_name = name.to_string()?;
                for (member, _) in names(library)? {
                    if !allowed(&library_name, &member) {
                        library.raw_set(member, Value::Nil)?;
                    }
                }
            }
            _ if allowed("", &name) => {}
            _ => globals.raw_set(name, Value::Nil)?,
        }
    }
    Ok(())
}

/// A number in [0, 1) that depends on nothing but its arguments: the first 53 bits of SHA-256(seed ‖ 0 ‖ text), over 2⁵³.
fn hash(seed: &[u8], text: &[u8]) -> f64 {
    let digest = Sha256::new()
        .chain_update(seed)
        .chain_update([0])
        .chain_update(text)
        .finalize();
    let first = u64::from_be_bytes(
        digest[..8]
            .try_into()
            .expect("a SHA-256 digest has 32 bytes"),
    );
    (first >> 11) as f64 / (1u64 << 53) as f64
}

fn printed(value: &Value) -> String {
    match value {
        Value::String(s) => s.to_string_lossy(),
        Value::Integer(i) => i.to_string(),
        Value::Number(n) => n.to_string(),
        Value::Boolean(b) => b.to_string(),
        other => other.type_name().into(),
    }
}

/// Control characters as escapes, and no more than `max` bytes, so that a log line stays one line.
pub fn tidy(text: &str, max: usize) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if out.len() + c.len_utf8() > max {
            out.push('…');
            break;
        }
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// First line of an error, without mlua's prefix and without control characters.
fn one_line(text: &str) -> String {
    let text = text
        .strip_prefix("syntax error: ")
        .or_else(|| text.strip_prefix("runtime error: "))
        .unwrap_or(text);
    tidy(text.lines().next().unwrap_or_default(), 500)
}

/// What an error of the policy says, without the traceback.
fn plain(error: &mlua::Error) -> String {
    match error {
        mlua::Error::CallbackError { cause, .. } => plain(cause),
        other => one_line(&other.to_string()),
    }
}

fn described(name: &str, error: &mlua::Error) -> String {
    let text = plain(error);
    if is_memory(error) {
        return Failure::Memory {
            at: At::find(name, &error.to_string()),
        }
        .to_string();
    }
    match At::find(name, &text).0 {
        Some(_) => text,
        None => format!("{}{text}", At::find(name, &error.to_string())),
    }
}

fn is_memory(error: &mlua::Error) -> bool {
    match error {
        mlua::Error::MemoryError(_) => true,
        mlua::Error::CallbackError { cause, .. } => is_memory(cause),
        _ => false,
    }
}

/// A name fit for messages: no control characters, and the end of a long one.
fn clean_name(name: &str) -> String {
    let name: String = name.chars().filter(|c| !c.is_control()).collect();
    let skip = name.chars().count().saturating_sub(100);
    let name: String = name.chars().skip(skip).collect();
    if name.is_empty() {
        "policy".into()
    } else {
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(source: &str) -> Program {
        Program::compile(source, "test.lua", 16 << 20, Printer::List(Arc::default())).unwrap()
    }

    /// Every name that a state really offers, in the form of [`ALLOWED`].
    fn surface(lua: &Lua) -> Vec<(String, Vec<String>)> {
        // A sandboxed state's own globals are an empty table that reads through to the real ones.
        let real: Table = lua
            .globals()
            .metatable()
            .unwrap()
            .raw_get("__index")
            .unwrap();
        let mut rows = vec![(String::new(), Vec::new())];
        for pair in real.pairs::<String, Value>() {
            match pair.unwrap() {
                (name, Value::Table(library)) => {
                    assert!(library.is_readonly(), "{name} can be written to");
                    let members = library.pairs::<String, Value>().map(|pair| {
                        let (member, value) = pair.unwrap();
                        assert!(
                            !value.is_table(),
                            "{name}.{member} is a table, whose members no list pins"
                        );
                        member
                    });
                    let members = members.collect();
                    rows.push((name, members));
                }
                (name, _) => rows[0].1.push(name),
            }
        }
        assert!(real.is_readonly());
        rows.iter_mut().for_each(|row| row.1.sort());
        rows.sort();
        rows
    }

    /// An update of mlua or Luau that adds a function must fail here and not reach a script unseen.
    #[test]
    fn a_state_offers_exactly_the_allowed_names() {
        let lua = frozen_state(&program("return {}")).unwrap().lua;
        let allowed: Vec<(String, Vec<String>)> = ALLOWED
            .iter()
            .map(|(l, m)| (l.to_string(), m.iter().map(|m| m.to_string()).collect()))
            .collect();
        assert_eq!(surface(&lua), allowed);
    }

    #[test]
    fn no_name_is_both_allowed_and_removed() {
        assert!(REMOVED.iter().all(|name| ALLOWED
            .iter()
            .all(|(l, m)| l != name && (!l.is_empty() || !m.contains(name)))));
    }

    #[test]
    fn the_hash_is_the_documented_one_and_never_changes() {
        // python3: int.from_bytes(hashlib.sha256(b"7\0episode").digest()[:8], "big") >> 11, over 2**53
        assert_eq!(hash(b"7", b"episode"), 0.888913990987995);
        let dog = Watchdog::start().unwrap();
        let source = "return { selftest = function() return locum.hash(7, 'episode') == locum.hash('7', 'episode') end }";
        let state = Sandbox::new(&program(source), &dog).unwrap();
        assert!(crate::selftest(&state, "test.lua").unwrap());
        let mean = (0..1000)
            .map(|i| hash(b"seed", format!("{i}").as_bytes()))
            .sum::<f64>()
            / 1000.0;
        assert!((0.45..0.55).contains(&mean), "{mean}");
    }

    #[test]
    fn printing_is_limited_to_a_rate() {
        let rate = PrintRate::default();
        let allowed = (0..1000).filter(|_| rate.allows()).count() as u64;
        // A second may turn in the middle.
        assert!(
            (PRINTS_PER_SECOND..=2 * PRINTS_PER_SECOND).contains(&allowed),
            "{allowed}"
        );
    }

    #[test]
    fn a_printed_line_stays_one_line() {
        assert_eq!(tidy("a\nb\u{1b}[31m", 100), "a\\nb\\u{1b}[31m");
        assert_eq!(tidy("abcdef", 3), "abc…");
    }
}
