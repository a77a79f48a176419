-- For hosts where a wrong call is dear: a student has to prove itself for longer, plays only what it has been taught, and
-- hands a step back as soon as it is unsure.
--
-- Differs from default.lua in its numbers, in `accept` (a floor on confidence), in `allow_tool` (calls that cannot be taken
-- back are the teacher's), in `gate` (more evidence) and in `fast_weights` (learning while reading ends where it does not
-- help). Everything it does not mention is the built-in default.

local M = {}

M.settings = {
  curate = { max_per_task = 2, held_out = 0.2 },
  gate = {
    margin = 0.02,       -- two points, not five
    alpha = 0.01,        -- one wrong promotion in a hundred at the margin
    min_exact = 0.6,
    shadow_steps = 100,
    canary_share = 0.2,  -- four of five episodes stay with the teacher meanwhile
    min_canary = 50,
    max_canary = 1000,
    keep_teacher = 0.1,  -- after a promotion the teacher still plays every tenth episode, to notice decay
  },
}

M.min_live_success = 0.6
M.trusted_after = 10
M.min_held_out_exact = 0.6
M.min_prob = 0.5
M.min_mean_logprob = -0.3
M.new_successes = 200
M.min_student_episodes = 50
M.rollback_episodes = 10
M.rollback_drop = 0.05
M.max_drift_share = 0.5
M.max_loss_rise = 0.5
-- Words in a tool's name that stand for what cannot be taken back.
M.final_words = { "delete", "remove", "drop", "pay", "refund", "transfer", "send", "submit", "publish", "cancel" }

local function is_final(tool)
  local name = string.lower(tool)
  for _, word in ipairs(M.final_words) do
    if string.find(name, word, 1, true) then
      return word
    end
  end
  return nil
end

--- Only a student that is known to be good, on tools it was taught.
function M.decide(step)
  local student = step.student
  if not student then
    return "teacher", "no student is offered"
  end
  if step.novelty > 0 then
    return "teacher", "a tool is new to the student"
  end
  if student.held_out_exact and student.held_out_exact < M.min_held_out_exact then
    return "teacher", "not exact enough on held-out steps"
  end
  if student.live_success and student.live_episodes >= M.trusted_after and student.live_success < M.min_live_success then
    return "teacher", "too few live successes"
  end
  -- Greedy: a verdict on one answer should hold for the next.
  return { who = "student", reason = step.stage, temperature = 0 }
end

--- One unlikely token is enough to hand the step back.
function M.accept(reply)
  if reply.min_prob < M.min_prob then
    return "teacher", string.format("least likely token %.2f", reply.min_prob)
  end
  if reply.mean_logprob < M.min_mean_logprob then
    return "teacher", string.format("mean log-probability %.2f", reply.mean_logprob)
  end
  if #reply.tool_calls == 0 and not string.find(reply.text, "%S") then
    return "teacher", "the reply is empty"
  end
  return "keep", "sure enough"
end

--- What cannot be taken back is the teacher's.
function M.allow_tool(call)
  local word = is_final(call.name)
  if word then
    return "teacher", "the tool's name says " .. word
  end
  return true
end

--- Only straight successes of the teacher.
function M.curate(episode)
  if episode.status ~= "success" or not episode.teacher or #episode.integrity_flags > 0 then
    return false, "not a clean success of the teacher"
  end
  if episode.error_results > 0 and episode.error_results * 4 > episode.agent_steps then
    return false, "more than a quarter of the calls were refused by their tools"
  end
  return true, "a clean success"
end

function M.schedule(world)
  if not world.has_base or world.job_running or world.trial_running then
    return "wait", "nothing to train, or busy"
  end
  if world.new_successes < M.new_successes then
    return "wait", string.format("%d of %d new successes", world.new_successes, M.new_successes)
  end
  return "now", string.format("%d new successes", world.new_successes)
end

--- Asks for more episodes than the test needs.
function M.gate(report)
  if report.verdict == "hold" or report.verdict == "reject" then
    return report.verdict, "the built-in verdict"
  end
  if report.stage == "canary" then
    if report.student_episodes < M.min_student_episodes then
      return "hold", string.format("%d of %d episodes", report.student_episodes, M.min_student_episodes)
    end
    if report.student_success and report.teacher_success and report.student_success < report.teacher_success - 0.1 then
      return "reject", "ten points below the teacher, whatever the test says"
    end
  end
  return "promote", "the built-in verdict"
end

function M.rollback(live)
  if live.built_in then
    return true, "the built-in test"
  end
  if live.episodes >= M.rollback_episodes and live.success < live.teacher_success - M.rollback_drop then
    return true, string.format("success %.2f, the teacher had %.2f", live.success, live.teacher_success)
  end
  return false, "doing well"
end

--- Half of the drift that would be undone is enough, and text that grows harder to read after learning from it is a bad teacher.
function M.fast_weights(fast)
  if fast.max_drift and fast.drift > fast.max_drift * M.max_drift_share then
    return { step = 0, reason = "far enough" }
  end
  if fast.loss and fast.loss_before and fast.loss > fast.loss_before + M.max_loss_rise then
    return { reset = true, reason = "it did not help" }
  end
  return true
end

function M.selftest()
  local function expect(want, got, what)
    if want ~= got then
      error(string.format("%s: expected %s, found %s", what, tostring(want), tostring(got)), 2)
    end
  end
  local student = { id = "s", version = 1, live_episodes = 0, held_out_exact = 0.8 }
  local step = { novelty = 0, stage = "canary", student = student }
  expect("student", M.decide(step).who, "a proved student plays")
  expect(0, M.decide(step).temperature, "greedily")
  step.novelty = 0.1
  expect("teacher", (M.decide(step)), "one new tool is too many")
  step.novelty = 0
  student.held_out_exact = 0.5
  expect("teacher", (M.decide(step)), "inexact")
  student.held_out_exact, student.live_success, student.live_episodes = 0.8, 0.5, M.trusted_after
  expect("teacher", (M.decide(step)), "losing")
  step.student = nil
  expect("teacher", (M.decide(step)), "no student")

  local reply = { min_prob = 0.9, mean_logprob = -0.01, text = "", tool_calls = { { name = "search" } } }
  expect("keep", (M.accept(reply)), "sure")
  reply.min_prob = 0.3
  expect("teacher", (M.accept(reply)), "one unlikely token")
  reply.min_prob, reply.mean_logprob = 0.9, -0.5
  expect("teacher", (M.accept(reply)), "unlikely on the whole")

  expect(true, (M.allow_tool { name = "search" }), "harmless")
  expect("teacher", (M.allow_tool { name = "Refund_Order" }), "final, in any case")

  local episode = { status = "success", teacher = true, integrity_flags = {}, error_results = 1, agent_steps = 4 }
  expect(true, (M.curate(episode)), "clean")
  episode.error_results = 2
  expect(false, (M.curate(episode)), "clumsy")
  episode.error_results, episode.status = 0, "failure"
  expect(false, (M.curate(episode)), "a failure")

  local world = { has_base = true, new_successes = M.new_successes }
  expect("now", (M.schedule(world)), "enough")
  world.trial_running = true
  expect("wait", (M.schedule(world)), "on trial")

  local report = { stage = "canary", verdict = "promote", student_episodes = 10, student_success = 0.9, teacher_success = 0.9 }
  expect("hold", (M.gate(report)), "too few episodes")
  report.student_episodes = M.min_student_episodes
  expect("promote", (M.gate(report)), "enough")
  report.student_success = 0.7
  expect("reject", (M.gate(report)), "far below")

  local live = { built_in = false, episodes = 10, success = 0.7, teacher_success = 0.8 }
  expect(true, (M.rollback(live)), "a fall")
  live.success = 0.78
  expect(false, (M.rollback(live)), "no fall")

  local fast = { drift = 0.02, max_drift = 0.1, loss = 1.2, loss_before = 1.1 }
  expect(true, (M.fast_weights(fast)), "learning goes on")
  fast.drift = 0.06
  expect(0, M.fast_weights(fast).step, "what was learned stays, and nothing is added")
  fast.drift, fast.loss = 0.02, 2.0
  expect(true, M.fast_weights(fast).reset, "harder than before")
  fast.loss = nil
  expect(true, (M.fast_weights(fast)), "the first chunk")
end

return M
