-- Half a million small tables for the collector.
-- expect: hook stopped after | over its memory limit
return {
  decide = function(step)
    local t = {}
    while true do
      for i = 1, 50000 do
        t[i] = { i }
      end
    end
  end,
}
