-- One call over megabytes.
-- expect: hook stopped after | over its memory limit
return {
  decide = function(step)
    local s = string.rep("x", 1e6)
    while true do
      s = string.reverse(s)
    end
  end,
}
