-- A number of a million digits.
-- expect: hook stopped after | over its memory limit
return {
  decide = function(step)
    local s = string.rep("1", 1e6)
    while true do
      tonumber(s)
    end
  end,
}
