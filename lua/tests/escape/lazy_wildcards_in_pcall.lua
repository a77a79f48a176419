-- The same, caught and tried again.
-- expect: hook stopped after
return {
  decide = function(step)
    while true do
      pcall(string.find, string.rep("a", 30000), ".-.-.-.-.-.-.-.-.-b")
    end
  end,
}
