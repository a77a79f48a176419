-- A callback for each of many characters, looping.
-- expect: hook stopped after
return {
  decide = function(step)
    return "student", (string.gsub(string.rep("a", 100), ".", function()
      while true do
      end
    end))
  end,
}
