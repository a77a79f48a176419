-- A selftest that never ends.
-- expect: load selftest failed: 
return {
  selftest = function()
    while true do
    end
  end,
}
