-- Chance makes verdicts unrepeatable.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", tostring(math.random())
  end,
}
