-- A message of eight megabytes.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    error(string.rep("x", 8e6))
  end,
}
