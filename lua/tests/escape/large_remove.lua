-- Removing the first of a long list moves all others, in one call.
-- expect: hook stopped after | over its memory limit
return {
  decide = function(step)
    local t = table.create(260000, 1)
    while true do
      table.remove(t, 1)
    end
  end,
}
