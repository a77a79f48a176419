-- The same one level down.
-- expect: hook raised an error
return {
  decide = function(step)
    step.tools[1] = "rm"
    return "student"
  end,
}
