-- A plain search with a long needle compares 10^12 bytes in one call.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    return "student", tostring(string.find(string.rep("a", 1e6), string.rep("a", 5e5) .. "b", 1, true))
  end,
}
