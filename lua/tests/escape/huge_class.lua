-- A text and a class that are too long together.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    local s, class = string.rep("a", 40000), "[" .. string.rep("b", 90) .. "a]*c"
    while true do
      string.find(s, class)
    end
  end,
}
