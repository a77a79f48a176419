-- Version 1 of the episode store. Times are milliseconds since 1970 (UTC). JSON columns hold compact UTF-8 JSON.
-- Unsigned 64-bit numbers are stored as the signed number with the same bits.

-- One row for every `Store` that is, or was when it died, recording into this file.
CREATE TABLE sessions (
  session       INTEGER PRIMARY KEY AUTOINCREMENT, -- never used twice; names the lock file sessions/<session>.lock
  pid           INTEGER NOT NULL,                  -- process id, for people; whether it lives is told by the lock
  opened_at_ms  INTEGER NOT NULL                   -- when the store was opened
);

-- One row for one episode, open or closed.
CREATE TABLE episodes (
  episode         INTEGER PRIMARY KEY,     -- short number that the other tables use; ascending in order of arrival
  id              BLOB NOT NULL UNIQUE,    -- 16 bytes: 48 bits of milliseconds, 80 random bits (or a content hash if imported)
  schema          TEXT NOT NULL,           -- version tag of the value, "locum/1"
  session_id      TEXT,                    -- host's session, if it names one
  parent_id       BLOB,                    -- id of the episode that started this one
  continued_from  BLOB,                    -- id of the episode this one goes on from
  task_id         TEXT NOT NULL,           -- identifies the task; empty if the host gives none
  domain          TEXT NOT NULL,           -- family of tasks
  group_key       TEXT,                    -- what the held-out split is made by
  instruction     TEXT NOT NULL,           -- the goal in words
  split           TEXT,                    -- "train" or "held_out" if the source has a split of its own
  agent_name      TEXT NOT NULL,           -- the agent that played
  agent_version   TEXT NOT NULL,           -- its version
  tools           TEXT,                    -- JSON list of tool specifications; null if there are none
  closed          INTEGER NOT NULL,        -- 1 once the host has ended it (or its process died)
  incomplete      INTEGER NOT NULL,        -- 1 if a step was lost: never trained on
  incomplete_why  TEXT,                    -- why, one sentence a line
  started_at_ms   INTEGER NOT NULL,        -- when it began; 0 if unknown
  ended_at_ms     INTEGER,                 -- when it was closed
  arrived_at_ms   INTEGER NOT NULL,        -- imported_at_ms, or started_at_ms of a live one: what `since` compares
  source_format   TEXT NOT NULL,           -- "live", "openai-chat", "tau-bench", "intercode"
  source_id       TEXT,                    -- file and place in it
  imported_at_ms  INTEGER,                 -- when it was imported
  redactions      TEXT,                    -- JSON list of redactions that changed something
  extra           TEXT,                    -- JSON object of fields without a column
  recorder        INTEGER,                 -- session that records it; null once closed
  status          TEXT,                    -- status of the outcome in force: success, partial, failure, aborted, unknown
  n_steps         INTEGER NOT NULL DEFAULT 0, -- steps recorded
  n_agent         INTEGER NOT NULL DEFAULT 0, -- of these by the agent
  n_teacher       INTEGER NOT NULL DEFAULT 0, -- of the agent's by the teacher
  n_student       INTEGER NOT NULL DEFAULT 0  -- of the agent's by a student
);
CREATE INDEX episodes_open ON episodes (recorder) WHERE recorder IS NOT NULL;
CREATE INDEX episodes_arrived ON episodes (arrived_at_ms);

-- One row for one turn.
CREATE TABLE steps (
  episode         INTEGER NOT NULL,        -- episodes.episode
  step            INTEGER NOT NULL,        -- 1, 2, ... within the episode
  source          TEXT NOT NULL,           -- system, user, agent
  actor           TEXT NOT NULL,           -- teacher, student, human, script, unknown
  model           TEXT,                    -- name of the teacher's model
  weights_id      TEXT,                    -- id of the student that spoke
  message         TEXT,                    -- what was said, as text
  message_parts   TEXT,                    -- or as a JSON list of content parts
  reasoning       TEXT,                    -- reasoning apart from the message
  started_at_ms   INTEGER,                 -- when the turn began
  ended_at_ms     INTEGER,                 -- when it was complete
  usage           TEXT,                    -- JSON: prompt_tokens, completion_tokens, cost_usd, latency_ms
  prompt_digest   TEXT,                    -- SHA-256 (hex) of the prompt tokens a student answered
  token_ids       BLOB,                    -- little-endian u32: number of prompt ids, prompt ids, reply ids
  decision        TEXT,                    -- JSON: who was asked and why
  counterfactual  TEXT,                    -- JSON: what the one who did not act would have done
  label           TEXT,                    -- JSON: whether the step may be a target, set from outside
  copied_context  INTEGER NOT NULL,        -- 1 if repeated from another episode
  extra           TEXT,                    -- JSON object of fields without a column
  UNIQUE (episode, step)
);

-- One row for one tool call of a step.
CREATE TABLE tool_calls (
  episode         INTEGER NOT NULL,        -- episodes.episode
  step            INTEGER NOT NULL,        -- steps.step
  n               INTEGER NOT NULL,        -- 0, 1, ... within the step
  call_id         TEXT NOT NULL,           -- the id that the observation answers to
  name            TEXT NOT NULL,           -- tool
  arguments       TEXT NOT NULL,           -- JSON object; null if they could not be parsed
  arguments_raw   TEXT,                    -- as they came, if printing the object would give other bytes
  extra           TEXT,                    -- JSON object of fields without a column
  UNIQUE (episode, step, n)
);

-- One row for one result of a tool call.
CREATE TABLE observations (
  episode         INTEGER NOT NULL,        -- episodes.episode
  step            INTEGER NOT NULL,        -- step that made the call
  n               INTEGER NOT NULL,        -- 0, 1, ... within the step, in order of arrival
  call_id         TEXT,                    -- the call it answers
  content         TEXT,                    -- what came back, as text
  content_parts   TEXT,                    -- or as a JSON list of content parts
  is_error        INTEGER NOT NULL,        -- 1 if the tool failed
  truncated       INTEGER NOT NULL,        -- 1 if the host cut it
  extra           TEXT,                    -- JSON object of fields without a column
  UNIQUE (episode, step, n)
);

-- Every outcome an episode was given; the one with the largest n is in force.
CREATE TABLE outcomes (
  episode         INTEGER NOT NULL,        -- episodes.episode
  n               INTEGER NOT NULL,        -- 0, 1, ... in order of arrival
  recorded_at_ms  INTEGER NOT NULL,        -- when it was recorded
  status          TEXT NOT NULL,           -- success, partial, failure, aborted, unknown
  score           REAL,                    -- 0 to 1, as the judge gave it
  reason          TEXT,                    -- why it ended, in the host's words
  criteria        TEXT,                    -- JSON list: id, weight, passed, evidence
  integrity       TEXT NOT NULL,           -- JSON: ok, flags
  judge           TEXT NOT NULL,           -- JSON: kind, name, version, privileged
  tags            TEXT,                    -- JSON list of words
  extra           TEXT,                    -- JSON object of fields without a column
  UNIQUE (episode, n)
);

-- Small durable documents of other rooms: jobs, trials, events, students.
CREATE TABLE documents (
  n               INTEGER PRIMARY KEY,     -- ascending in order of first writing
  kind            TEXT NOT NULL,           -- job, trial, event, student
  id              TEXT NOT NULL,           -- the owner's id
  value           TEXT NOT NULL,           -- JSON
  updated_at_ms   INTEGER NOT NULL,        -- when it was last written
  UNIQUE (kind, id)
);
