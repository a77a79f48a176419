---@meta
-- Generated from lua/src/surface.rs; `UPDATE=1 cargo test -p locum-lua` writes it again.

---The student that is offered for a step.
---@class locum.Student
---@field id string content hash
---@field version number 1, 2, ... by creation
---@field live_success? number share of live episodes it won; absent before the first outcome
---@field live_episodes number live episodes with an outcome
---@field held_out_exact? number share of held-out steps it answered exactly like the teacher

---Argument of decide.
---@class locum.Step
---@field task string task id
---@field domain string the host's word for a kind of task
---@field turn number agent turns already played in the episode
---@field tools string[] names of the request's tools
---@field prompt_bytes number bytes of the request's messages
---@field novelty number 0 = every tool was in the training set, 1 = none was
---@field deadline_ms number time the host gives
---@field student? locum.Student absent when none can be offered
---@field stage string shadow, canary, promoted or pinned

---One tool call of a reply.
---@class locum.ToolCall
---@field id string
---@field name string
---@field arguments any as parsed from JSON; null is absent

---Argument of accept.
---@class locum.Reply
---@field task string task id
---@field domain string
---@field text string
---@field tool_calls locum.ToolCall[]
---@field mean_logprob number of the tokens that the grammar left open
---@field min_prob number probability of the least likely of them
---@field tokens number
---@field latency_ms number

---Argument of allow_tool.
---@class locum.Tool
---@field task string task id
---@field domain string
---@field name string the tool
---@field arguments any as parsed from JSON; null is absent

---Argument of redact.
---@class locum.Text
---@field role string system, user, assistant, tool or arguments
---@field tool? string the tool that wrote it
---@field content string at most 1 MiB

---A step of an episode in one line.
---@class locum.StepLine
---@field index number
---@field source string system, user or agent
---@field call? string name and arguments of the first call
---@field is_error boolean its tool refused it
---@field masked boolean carries no loss

---Argument of label and curate.
---@class locum.Episode
---@field id string
---@field task string task id
---@field domain string
---@field source_format string empty for recorded episodes
---@field teacher boolean a teacher played in it
---@field steps locum.StepLine[]
---@field agent_steps number
---@field error_results number agent steps whose tool refused them
---@field repeated_calls number calls equal to the one before
---@field masked_steps number
---@field status string success, partial, failure, aborted or unknown
---@field score? number the host's score
---@field integrity_flags string[] empty for a sound outcome
---@field tags string[]
---@field cost_usd number

---Argument of schedule.
---@class locum.World
---@field episodes number
---@field successes number
---@field new_successes number since the last job began
---@field new_episodes number
---@field hours_since_job? number absent before the first
---@field job_running boolean
---@field trial_running boolean a candidate is in shadow or canary
---@field has_base boolean there is a model to train
---@field promoted boolean a student is in service
---@field free_memory_mb number
---@field load number of the machine, in cores

---Argument of recipe.
---@class locum.Dataset
---@field episodes number
---@field samples number
---@field tokens number
---@field target_tokens number tokens that carry loss
---@field tasks number
---@field num_hidden_layers number of the base
---@field threads number for training

---Argument of gate.
---@class locum.Candidate
---@field stage string offline, shadow or canary: the stage just finished
---@field candidate string student id
---@field held_out_exact number share of held-out steps with the teacher's exact call
---@field held_out_loss number
---@field base_exact number the same share for the base
---@field shadow_agreement? number
---@field teacher_success? number
---@field teacher_episodes number
---@field student_success? number
---@field student_episodes number
---@field verdict string what the built-in rules say
---@field reasons string[] and why

---Argument of rollback.
---@class locum.Live
---@field student string student id
---@field episodes number live episodes since the promotion
---@field success number share of them won
---@field teacher_success number the teacher's in the canary
---@field deferrals number steps left to the teacher
---@field steps number
---@field built_in boolean what the built-in test says

---Argument of fast_weights.
---@class locum.Fast
---@field task string task id
---@field domain string
---@field stage string episode before a prompt is read, chunk behind a chunk
---@field student string student id
---@field version number
---@field position number tokens read
---@field chunk number tokens of a chunk
---@field drift number largest relative change of a layer since the episode began
---@field max_drift? number the drift at which it is undone and the teacher asked
---@field loss? number mean negative log-likelihood of the chunk just read
---@field loss_before? number the same of the chunks before it

---Argument of retain.
---@class locum.Stored
---@field id string
---@field task string task id
---@field domain string
---@field scope string empty for episodes without one
---@field source_format string live for recorded episodes
---@field status string success, partial, failure, aborted or unknown
---@field tags string[]
---@field age_days number since it began or was imported
---@field steps number
---@field bytes number of the episode as JSON
---@field incomplete boolean a step was lost
---@field learned boolean a student learned from it

---Argument of on_event.
---@class locum.Event
---@field kind string job_state, student_swapped, rolled_back, store_trouble, policy_loaded, fault, fast_weights, forgotten or hook_off
---@field subject number job number or student version, by kind
---@field number number
---@field detail any as parsed from JSON; null is absent

---What decide and accept may return instead of two strings.
---@class locum.Choice
---@field who string "student" ("keep") or "teacher"
---@field reason? string
---@field temperature? number 0 to 2
---@field max_tokens? number 1 to 4096

---What label may return.
---@class locum.Label
---@field status? string success, partial, failure, aborted or unknown
---@field success? boolean short for status
---@field score? number
---@field tags? string[]

---What curate may return instead of a boolean.
---@class locum.Use
---@field use boolean
---@field weight? number 0 to 100, 1 unless given
---@field reason? string

---What fast_weights may return instead of a boolean.
---@class locum.Learn
---@field on? boolean true unless given
---@field step? number factor on the trained step size, 0 to 10; 1 unless given
---@field reset? boolean back to the trained weights
---@field reason? string

---What recipe may return; absent means the built-in value, and values are clamped.
---@class locum.Knobs
---@field method? string upper, lora or full
---@field tokens? number
---@field max_seconds? number
---@field epochs? number
---@field lr? number
---@field rank? number of lora
---@field alpha? number of lora
---@field upper_layers? number layers trained by upper
---@field batch_tokens? number
---@field warmup_steps? number
---@field weight_decay? number
---@field trim_after? number share of the job after which unlikely targets are left out
---@field trim_below? number mean probability below which a target is unlikely
---@field patience? number
---@field seed? number
---@field compute? string bf16 or f32: the numbers of products in training
---@field memory_mib? number memory a training may take; with less, more is computed twice
---@field ttt? string layers that learn while the student reads, and how they begin: published, next_token or off
---@field ttt_every? number every which layer learns
---@field ttt_chunk? number tokens of a chunk
---@field ttt_lr? number step size of the updates while reading
---@field ttt_rate? number learning rate of their filters and projections
---@field ttt_from? number share of the training before they begin to learn
---@field ttt_decay? number share that a chunk's end keeps of what was written so far
---@field ttt_delta? number strength of a delta rule, in place of a decay

---How the student sees an episode.
---@class locum.View
---@field system? string text of the system turn
---@field host_system? boolean whether the host's system prompt follows
---@field tools? string none, signatures or described
---@field goal? string first, last, both or none
---@field steps_back? number earlier agent turns shown
---@field older? string call, values or call_and_line
---@field full_steps? number of which so many are shown whole
---@field turns? boolean the history as turns of the chat, for whole episodes in one text
---@field observation_chars? number
---@field focus? number clauses that share words with the goal
---@field focus_overlap? number words they must share
---@field max_tokens? number of the whole prompt

---Rules of curation that need no code.
---@class locum.CurateSettings
---@field max_per_task? number
---@field max_copies? number most kept episodes with the same words and actions
---@field held_out? number share of task groups
---@field near_duplicate? number similarity from which an episode is a duplicate
---@field mask_loops? boolean
---@field mask_repeats? boolean
---@field mask_errors? boolean
---@field mask_noops? boolean
---@field mask_derails? boolean
---@field derail_support? number times an action must have been seen to outvote another
---@field derail_tolerance? number share by which a step may be worse than the best known
---@field max_length_ratio? number 0 = off

---Numbers of the gate.
---@class locum.GateSettings
---@field margin? number of non-inferiority, as a share
---@field alpha? number rate of wrong promotions
---@field min_exact? number
---@field min_held_out_steps? number
---@field shadow_steps? number
---@field max_shadow_failures? number
---@field canary_share? number
---@field min_canary? number
---@field max_canary? number
---@field min_slice? number
---@field keep_teacher? number

---How a student plays.
---@class locum.ServeSettings
---@field avoid_repeats? boolean a call that changed nothing is not made again at once

---Fixed settings of a policy.
---@class locum.Settings
---@field curate? locum.CurateSettings
---@field gate? locum.GateSettings
---@field serve? locum.ServeSettings

---What a policy file returns. Every field may be left out.
---@class locum.Policy
---@field view? locum.View
---@field settings? locum.Settings
---@field selftest? fun(): boolean?
---@field decide? fun(step: locum.Step): string|locum.Choice, string? Who plays this step?
---@field accept? fun(reply: locum.Reply): string|locum.Choice, string? Keep the student's finished reply?
---@field allow_tool? fun(call: locum.Tool): boolean|string, string? May this call of the student's leave us?
---@field redact? fun(text: locum.Text): string? The text to record; nil drops it.
---@field label? fun(episode: locum.Episode): locum.Label? Judges an episode at its end.
---@field curate? fun(episode: locum.Episode): boolean|locum.Use, string? May the episode enter a dataset?
---@field schedule? fun(world: locum.World): string, string? Is it time to distil?
---@field recipe? fun(dataset: locum.Dataset): locum.Knobs? Knobs of a job.
---@field gate? fun(report: locum.Candidate): string, string? A word on a candidate.
---@field rollback? fun(live: locum.Live): boolean?, string? Take the promoted student back?
---@field fast_weights? fun(fast: locum.Fast): boolean?|locum.Learn?, string? How does the student go on learning while it reads?
---@field retain? fun(episode: locum.Stored): string What becomes of a stored episode: keep, drop or anonymise?
---@field on_event? fun(event: locum.Event): nil Something has happened.

---@class locum
locum = {}

---A number in [0, 1) that depends on nothing but its arguments: for stable sampling.
---@param seed string|integer
---@param text string
---@return number
function locum.hash(seed, text) end
