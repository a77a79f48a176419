-- gsub in a loop over a large text.
-- expect: hook stopped after
return {
  decide = function(step)
    local text = string.rep("ab", 50000)
    while true do
      string.gsub(text, "b", "")
    end
  end,
}
