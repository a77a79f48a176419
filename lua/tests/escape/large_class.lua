-- A class at each place of a long text, in one step of the matcher.
-- expect: hook stopped after | over its memory limit
return {
  decide = function(step)
    local s, class = string.rep("a", 20000), "[" .. string.rep("b", 90) .. "a]*c"
    while true do
      string.find(s, class)
    end
  end,
}
