-- The demo's policy: when to distil, from what, how, and when the student may play.
-- docs/policy.md explains every field. `run.py` replaces the three numbers below where its options say so.

local NEW_SUCCESSES = 200 -- distil when the teacher has succeeded this often since the last time
local TRAIN_SECONDS = 240 -- of one distillation
local TRAIN_TOKENS = 0 -- 0 leaves it to the seconds

local M = {}

-- The robot needs its last three moves, what it sees, the goal, and the part of the view that names the goal's things.
M.view = {
  tools = "none", -- there is one, and the student learns it by heart
  goal = "last",
  steps_back = 3,
  older = "values", -- `forward left forward`
  full_steps = 0,
  focus = 3,
  focus_overlap = 2,
  observation_chars = 1000,
  max_tokens = 256,
}

M.settings = {
  curate = {
    max_per_task = 3,
    held_out = 0.1,
    mask_loops = true, -- most lucky successes wander: what led back to where the robot had been teaches nothing
    mask_repeats = true,
    mask_errors = true,
  },
  gate = {
    margin = 0.05,
    alpha = 0.05,
    min_exact = 0.4,
    shadow_steps = 20,
    canary_share = 0.5,
    min_canary = 10,
    max_canary = 400,
  },
  serve = {
    avoid_repeats = true, -- a robot that walked into a box turns, instead of walking into it until its time is up
  },
}

--- Who plays this step? Whoever the gate has let in: a candidate in its canary, a promoted student, a pinned one.
function M.decide(step)
  if not step.student then
    return "teacher", "no student is offered"
  end
  return "student", step.stage
end

--- May the episode teach? Only successes in which the teacher played.
function M.curate(episode)
  if episode.status ~= "success" then
    return false, "not a success"
  end
  if not episode.teacher then
    return false, "no teacher played in it"
  end
  return true, "a teacher's success"
end

--- Is it time to distil? Once, when there is enough to learn from.
function M.schedule(world)
  if not world.has_base then
    return "wait", "no base model"
  end
  if world.job_running or world.trial_running or world.promoted or world.hours_since_job then
    return "wait", "there has been a job already"
  end
  if world.new_successes < NEW_SUCCESSES then
    return "wait", string.format("%d of %d successes", world.new_successes, NEW_SUCCESSES)
  end
  return "now", string.format("%d successes", world.new_successes)
end

--- How to distil: the upper half of the layers, as fast as the lower half's cached outputs allow.
function M.recipe(dataset)
  local knobs = {
    method = "upper",
    upper_layers = math.max(1, math.floor(dataset.num_hidden_layers / 2)),
    lr = 3e-4,
    batch_tokens = 640,
    warmup_steps = 10,
    max_seconds = TRAIN_SECONDS,
    seed = 1,
  }
  if TRAIN_TOKENS > 0 then
    knobs.tokens = TRAIN_TOKENS
  end
  return knobs
end

function M.selftest()
  local world = { has_base = true, job_running = false, trial_running = false, promoted = false, new_successes = NEW_SUCCESSES }
  assert(M.schedule(world) == "now", "enough successes")
  world.new_successes = NEW_SUCCESSES - 1
  assert(M.schedule(world) == "wait", "one too few")
  assert(M.curate({ status = "success", teacher = true }) == true, "a teacher's success teaches")
  assert(M.curate({ status = "failure", teacher = true }) == false, "a failure does not")
  assert(M.decide({ student = false, stage = "" }) == "teacher", "without a student the teacher plays")
  assert(M.recipe({ num_hidden_layers = 30 }).upper_layers == 15, "half of the layers")
end

return M
