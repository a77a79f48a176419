-- The handler of an error loops.
-- expect: hook stopped after
return {
  decide = function(step)
    xpcall(error, function()
      while true do
      end
    end)
  end,
}
