-- The refusal of memory is caught, and tried again.
-- expect: hook stopped after | over its memory limit
return {
  decide = function(step)
    while true do
      pcall(string.rep, "x", 2 ^ 30)
    end
  end,
}
