-- Megabytes in one call: more than one may walk over.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    local s = string.rep("x", 1.1e6)
    while true do
      s = string.reverse(s)
    end
  end,
}
