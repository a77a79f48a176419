-- A reason of a megabyte is cut short.
-- expect: answer blocked
return {
  decide = function(step)
    return "teacher", "blocked " .. string.rep("x", 1e6)
  end,
}
