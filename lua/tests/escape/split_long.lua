-- Splitting compares the separator at every place.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    return "student", tostring(#string.split(string.rep("a", 1e6), string.rep("a", 5e5) .. "b"))
  end,
}
