-- The handler is entered by the stop itself, and loops.
-- expect: hook stopped after
return {
  decide = function(step)
    while true do
      xpcall(function()
        while true do
        end
      end, function()
        while true do
        end
      end)
    end
  end,
}
