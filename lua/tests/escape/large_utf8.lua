-- Counting characters of megabytes.
-- expect: hook stopped after | over its memory limit
return {
  decide = function(step)
    local s = string.rep("x", 1e6)
    while true do
      utf8.len(s)
    end
  end,
}
