-- A gigabyte in one call.
-- expect: hook over its memory limit | stopped after
return {
  decide = function(step)
    return "student", tostring(#string.rep("x", 2 ^ 30))
  end,
}
