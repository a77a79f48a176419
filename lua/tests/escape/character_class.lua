-- A class of a million characters is looked through for each character of the text, in one step of the matcher.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    return "student", tostring(string.match(string.rep("a", 1e6), "[" .. string.rep("b", 1e6) .. "a]*c"))
  end,
}
