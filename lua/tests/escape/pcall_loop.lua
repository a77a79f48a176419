-- Each stop is caught, and the loop goes on.
-- expect: hook stopped after
return {
  decide = function(step)
    while true do
      pcall(function()
        while true do
        end
      end)
    end
  end,
}
