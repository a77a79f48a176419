-- A search in megabytes for what is almost there at each place.
-- expect: hook stopped after | over its memory limit
return {
  decide = function(step)
    local million = string.rep("a", 1e6)
    local s = million .. million .. million .. million
    while true do
      pcall(string.find, s, "ab", 1, true)
      pcall(string.find, string.sub(s, 1, 2e6), "ab", 1, true)
    end
  end,
}
