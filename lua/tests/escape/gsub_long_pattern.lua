-- gsub with a long pattern.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    return "student", (string.gsub(string.rep("a", 1e6), "[" .. string.rep("b", 1e6) .. "]*c", ""))
  end,
}
