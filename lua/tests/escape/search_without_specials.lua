-- A pattern without special characters is searched plainly too.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    return "student", tostring(string.find(string.rep("a", 1e6), string.rep("a", 5e5) .. "b"))
  end,
}
