-- A message of eight megabytes.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    local million = string.rep("x", 1e6)
    local four = million .. million .. million .. million
    error(four .. four)
  end,
}
