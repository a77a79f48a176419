-- A hook changes what the next one sees.
-- expect: hook raised an error
return {
  decide = function(step)
    step.task = "other"
    return "student"
  end,
}
