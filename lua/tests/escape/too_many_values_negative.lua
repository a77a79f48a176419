-- The same from the other end.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    return "student", tostring(select("#", table.unpack({}, -2 ^ 31, 2 ^ 31 - 1)))
  end,
}
