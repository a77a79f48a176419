-- A gigabyte in one call.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", tostring(#string.rep("x", 2 ^ 30))
  end,
}
