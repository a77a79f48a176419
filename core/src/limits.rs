//! Every named limit and its default, in one place, so that "put a limit on everything" can be checked by reading one page.

/// Largest content of one recorded step, in bytes.
pub const MAX_STEP_BYTES: usize = 1 << 20;
/// Largest sum of step contents of one episode, in bytes.
pub const MAX_EPISODE_BYTES: usize = 16 << 20;
/// Deepest nesting of any JSON that enters from outside.
pub const MAX_JSON_DEPTH: usize = 64;
/// Steps waiting for the writer thread before `record` answers "busy".
pub const MAX_QUEUED_RECORDS: usize = 4096;
/// Bytes waiting for the writer thread before `record` answers "busy".
pub const MAX_QUEUED_BYTES: usize = 64 << 20;
/// Tools in one request.
pub const MAX_TOOLS: usize = 256;
/// Bytes of a policy's source.
pub const MAX_POLICY_BYTES: usize = 256 << 10;
/// Longest name or id that crosses the border, in bytes.
pub const MAX_NAME_BYTES: usize = 256;
/// Most tokens of one prompt that the engine accepts.
pub const MAX_PROMPT_TOKENS: usize = 8192;
/// Most tokens of one reply.
pub const MAX_REPLY_TOKENS: usize = 4096;
/// Default number of reply tokens when a request names none.
pub const DEFAULT_REPLY_TOKENS: usize = 256;
/// Default time for a step when a request names none, in milliseconds.
pub const DEFAULT_DEADLINE_MS: u32 = 30_000;
/// Largest `tokenizer.json` or `config.json` that is opened, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 64 << 20;
/// Snapshots kept of the state of one episode.
pub const MAX_FAST_SNAPSHOTS: usize = 16;
/// Bytes that KV caches kept for prefix reuse may take, or what two prompts of the view take if that is more; snapshots of episodes
/// may take as much again.
pub const MAX_PREFIX_CACHE_BYTES: usize = 256 << 20;
/// Largest file that an import reads, in bytes.
pub const MAX_IMPORT_BYTES: u64 = 1 << 30;
/// Bytes of one tool's parameter schema.
pub const MAX_TOOL_SPEC_BYTES: usize = 256 << 10;
/// Tool calls in one reply.
pub const MAX_CALLS: usize = 16;
/// Bytes that a training may take where nobody says, as estimated before it begins; the process itself comes on top.
pub const DEFAULT_TRAIN_BYTES: u64 = 6 << 30;
/// Largest model file or folder that is imported as a base, in bytes.
pub const MAX_MODEL_BYTES: u64 = 16 << 30;
