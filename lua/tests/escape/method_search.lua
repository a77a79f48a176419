-- The same through the method of a string.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    return "student", tostring(string.rep("a", 1e6):find(string.rep("a", 5e5) .. "b"))
  end,
}
