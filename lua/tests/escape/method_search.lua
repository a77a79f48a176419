-- The same through the method of a string.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    return "student", tostring(string.rep("a", 4e6):find(string.rep("a", 2e6) .. "b"))
  end,
}
