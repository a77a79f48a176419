-- A table of 2^26 entries.
-- expect: hook over its memory limit | raised an error | stopped after
return {
  decide = function(step)
    return "student", tostring(#table.create(2 ^ 26, 1))
  end,
}
