-- Policy for whole episodes, BossLevel's and ScienceWorld's: every step of a success teaches, and the student sees all that came before.
-- docs/ttt.md tells what for; docs/policy.md explains every field.

local TTT = "published" -- how the layers that learn while they read begin; "off" trains without
local TTT_CHUNK = 128 -- an episode of 60 steps has some 15 chunks
local TTT_EVERY = 6
local TTT_LR = 0.3
local TTT_RATE = 1e-3

local M = {}

M.view = {
  turns = true, -- one text an episode, which only grows
  tools = "none",
  goal = "first",
  steps_back = 256,
  focus = 0,
  observation_chars = 800,
  max_tokens = 8000,
}

M.settings = {
  curate = {
    max_per_task = 1,
    held_out = 0.35,
    -- The bot searches: coming back to where it has been is part of its way.
    mask_loops = false,
    mask_repeats = false,
    mask_noops = false,
    mask_derails = false,
  },
}

--- Who plays this step?
function M.decide(step)
  if not step.student then
    return "teacher", "no student is offered"
  end
  return "student", step.stage
end

--- May the episode teach?
function M.curate(episode)
  if episode.status ~= "success" or not episode.teacher then
    return false, "not a teacher's success"
  end
  return true, "a teacher's success"
end

--- Jobs are started by hand.
function M.schedule(_)
  return "wait", "by hand"
end

--- How to distil. Whole episodes are long rows, so a row is a step of its own.
function M.recipe(_)
  return {
    method = "lora",
    rank = 16,
    lr = 1e-3,
    batch_tokens = 1024,
    warmup_steps = 5,
    seed = 1,
    ttt = TTT,
    ttt_chunk = TTT_CHUNK,
    ttt_every = TTT_EVERY,
    ttt_lr = TTT_LR,
    ttt_rate = TTT_RATE,
  }
end

return M
