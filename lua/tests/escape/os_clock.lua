-- A clock makes verdicts unrepeatable.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", tostring(os.clock())
  end,
}
