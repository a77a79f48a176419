-- The policy of a host that brings none: for tool-calling chat agents.
--
-- A student plays as soon as the engine offers one (in a canary, after a promotion, or pinned by the operator); it is
-- distilled anew with every 50 new successes; only clean successes of the teacher teach it. Copy this file and change it:
-- every field of `view` and `settings` and every hook may be left out. docs/policy.md explains them all.

local M = {}

-- What of an episode the student sees, in training and in serving alike. A student learned under one view is not served under
-- another, so a change here means distilling again.
M.view = {
  system = "",              -- a system turn of our own; the host's long one is left out (host_system)
  host_system = false,
  tools = "signatures",     -- one line a tool: `search(query, limit)`
  goal = "last",            -- small models look at the end of the prompt
  steps_back = 6,           -- earlier calls, compact
  older = "call",
  full_steps = 1,           -- of which the nearest is shown with its observation
  observation_chars = 2000, -- the end of a longer observation is kept
  focus = 3,                -- clauses of the observation that share words with the goal
  focus_overlap = 2,
  max_tokens = 1024,
}

M.settings = {
  curate = {
    max_per_task = 3,      -- one task must not fill the dataset
    held_out = 0.1,        -- share of task groups that the gate asks about and training never sees
    near_duplicate = 0.95,
    mask_loops = true,     -- no loss on steps that led back to where the agent had been
    mask_repeats = true,   -- nor on an action repeated without effect
    mask_errors = true,    -- nor on a call that the tool refused
    mask_derails = true,   -- nor on steps that all episodes together show to lead away from success
  },
  gate = {
    margin = 0.05,         -- the student may lose five points of success against its teacher, not more
    alpha = 0.05,
    min_exact = 0.4,
    shadow_steps = 20,
    canary_share = 0.5,
    min_canary = 10,
    max_canary = 400,
  },
}

-- Numbers that the hooks use.
M.new_successes = 50
M.max_novelty = 0.5
M.min_live_success = 0.2
M.trusted_after = 20
M.max_masked_share = 0.5
M.rollback_episodes = 30
M.rollback_drop = 0.15

--- Who plays this step? The engine has already made sure that the student can play it at all.
function M.decide(step)
  local student = step.student
  if not student then
    return "teacher", "no student is offered"
  end
  if step.stage == "pinned" then
    return "student", "pinned by the operator"
  end
  if step.novelty > M.max_novelty then
    return "teacher", "more than half of the tools are new to the student"
  end
  local success = student.live_success
  if success and student.live_episodes >= M.trusted_after and success < M.min_live_success then
    return "teacher", "the student hardly ever succeeds"
  end
  return "student", step.stage
end

--- Keep the student's finished reply? An empty one helps nobody.
function M.accept(reply)
  if #reply.tool_calls == 0 and not string.find(reply.text, "%S") then
    return "teacher", "the reply is empty"
  end
  return "keep", "the grammar holds"
end

--- May the episode teach? Only clean successes in which the teacher played.
function M.curate(episode)
  if episode.status ~= "success" then
    return false, "not a success"
  end
  if #episode.integrity_flags > 0 then
    return false, "flagged: " .. episode.integrity_flags[1]
  end
  if not episode.teacher then
    return false, "no teacher played in it"
  end
  if episode.agent_steps > 0 and episode.masked_steps / episode.agent_steps > M.max_masked_share then
    return { use = true, weight = 0.5, reason = "a success by way of many detours" }
  end
  return true, "a teacher's success"
end

--- Is it time to distil?
function M.schedule(world)
  if not world.has_base then
    return "wait", "no base model"
  end
  if world.job_running or world.trial_running then
    return "wait", "a job or a trial is running"
  end
  if world.new_successes < M.new_successes then
    return "wait", string.format("%d of %d new successes", world.new_successes, M.new_successes)
  end
  return "now", string.format("%d new successes", world.new_successes)
end

--- A word on a judged candidate: agree, except with one that learned less than its base already knew.
function M.gate(report)
  if report.stage == "offline" and report.held_out_exact < report.base_exact then
    return "reject", "worse than the model it was made from"
  end
  if report.verdict == "hold" or report.verdict == "reject" then
    return report.verdict, "the built-in verdict"
  end
  return "promote", "the built-in verdict"
end

--- Take the promoted student back? The built-in test decides; a steep fall is enough for us without it.
function M.rollback(live)
  if live.built_in then
    return true, "the built-in test"
  end
  if live.episodes >= M.rollback_episodes and live.success < live.teacher_success - M.rollback_drop then
    return true, string.format("success %.2f, the teacher had %.2f", live.success, live.teacher_success)
  end
  return false, "doing well"
end

-- Run each time the policy is loaded; an error refuses the policy.
function M.selftest()
  local function expect(want, got, what)
    if want ~= got then
      error(string.format("%s: expected %s, found %s", what, tostring(want), tostring(got)), 2)
    end
  end
  local function step(fields)
    local s = { task = "t", domain = "d", turn = 0, tools = { "search" }, prompt_bytes = 100, novelty = 0, deadline_ms = 1000,
      student = { id = "s", version = 1, live_episodes = 0 }, stage = "promoted" }
    for k, v in pairs(fields) do
      s[k] = v
    end
    return s
  end
  expect("student", (M.decide(step {})), "an offered student plays")
  expect("teacher", (M.decide(step { student = false })), "without a student the teacher plays")
  expect("teacher", (M.decide(step { novelty = 0.9 })), "unknown tools are the teacher's")
  expect("student", (M.decide(step { novelty = 0.9, stage = "pinned" })), "a pinned student plays regardless")
  local weak = { id = "s", version = 1, live_success = 0.1, live_episodes = M.trusted_after }
  expect("teacher", (M.decide(step { student = weak })), "a failing student rests")
  weak.live_episodes = 1
  expect("student", (M.decide(step { student = weak })), "one failure is no verdict")

  expect("keep", (M.accept { text = "", tool_calls = { { name = "search" } } }), "a call is a reply")
  expect("teacher", (M.accept { text = " \n", tool_calls = {} }), "an empty reply is refused")

  local function episode(fields)
    local e = { status = "success", integrity_flags = {}, teacher = true, agent_steps = 4, masked_steps = 0 }
    for k, v in pairs(fields) do
      e[k] = v
    end
    return e
  end
  expect(true, (M.curate(episode {})), "a clean success teaches")
  expect(false, (M.curate(episode { status = "partial" })), "a partial success does not")
  expect(false, (M.curate(episode { integrity_flags = { "time_went_back" } })), "a flagged one does not")
  expect(false, (M.curate(episode { teacher = false })), "the student's own does not")
  expect(0.5, M.curate(episode { masked_steps = 3 }).weight, "a detour weighs half")
  expect(true, (M.curate(episode { masked_steps = 2 })), "half of the steps is not many")

  local function world(fields)
    local w = { has_base = true, job_running = false, trial_running = false, new_successes = M.new_successes }
    for k, v in pairs(fields) do
      w[k] = v
    end
    return w
  end
  expect("now", (M.schedule(world {})), "enough successes")
  expect("wait", (M.schedule(world { new_successes = M.new_successes - 1 })), "one too few")
  expect("wait", (M.schedule(world { trial_running = true })), "a trial is running")
  expect("wait", (M.schedule(world { job_running = true })), "a job is running")
  expect("wait", (M.schedule(world { has_base = false })), "nothing to train")

  local report = { stage = "offline", held_out_exact = 0.5, base_exact = 0.6, verdict = "promote" }
  expect("reject", (M.gate(report)), "worse than its base")
  report.base_exact = 0.1
  expect("promote", (M.gate(report)), "agrees")
  report.verdict = "hold"
  expect("hold", (M.gate(report)), "agrees with a hold")

  local live = { built_in = false, episodes = M.rollback_episodes, success = 0.6, teacher_success = 0.8 }
  expect(true, (M.rollback(live)), "a steep fall")
  live.episodes = 3
  expect(false, (M.rollback(live)), "three episodes are no fall")
  live.built_in = true
  expect(true, (M.rollback(live)), "the built-in test is followed")
end

return M
