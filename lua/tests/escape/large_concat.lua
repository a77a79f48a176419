-- Joining nothing, many times.
-- expect: hook stopped after | over its memory limit
return {
  decide = function(step)
    local t = table.create(260000, "")
    while true do
      table.concat(t)
    end
  end,
}
