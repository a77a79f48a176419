-- A search in megabytes for what is almost there at each place.
-- expect: hook stopped after | over its memory limit
return {
  decide = function(step)
    local s = string.rep("a", 4e6)
    while true do
      pcall(string.find, s, "ab", 1, true)
      pcall(string.find, string.sub(s, 1, 2e6), "ab", 1, true)
    end
  end,
}
