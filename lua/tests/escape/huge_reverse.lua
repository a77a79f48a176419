-- Megabytes in one call: more than one may walk over.
-- expect: hook raised an error
return {
  decide = function(step)
    local s = string.rep("x", 4e6)
    while true do
      s = string.reverse(s)
    end
  end,
}
