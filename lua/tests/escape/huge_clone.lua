-- A large table copied at once: more than one call may walk over.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    local t = table.create(270000, 1)
    while true do
      local u = table.clone(t)
    end
  end,
}
