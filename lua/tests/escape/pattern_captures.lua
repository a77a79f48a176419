-- More captures than the matcher has room for.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    return "student", string.match(string.rep("a", 100), string.rep("(a)", 100))
  end,
}
