-- A comparison that lies.
-- expect: hook stopped after | raised an error
return {
  decide = function(step)
    local t = table.create(20000, 1)
    while true do
      table.sort(t, function()
        return true
      end)
    end
  end,
}
