-- Balanced matching restarts at every bracket.
-- expect: hook stopped after
return {
  decide = function(step)
    return "student", tostring(string.find(string.rep("(", 60000), "%b()"))
  end,
}
