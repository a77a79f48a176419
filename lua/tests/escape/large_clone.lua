-- Copies of a large table, and garbage to collect.
-- expect: hook stopped after | over its memory limit
return {
  decide = function(step)
    local t = table.create(200000, 1)
    while true do
      local u = table.clone(t)
    end
  end,
}
