-- The plain endless loop.
-- expect: hook stopped after
return {
  decide = function(step)
    while true do
    end
  end,
}
