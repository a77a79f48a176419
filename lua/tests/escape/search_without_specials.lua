-- A pattern without special characters is searched plainly too.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    return "student", tostring(string.find(string.rep("a", 4e6), string.rep("a", 2e6) .. "b"))
  end,
}
