-- Functions that grow for ever.
-- expect: hook over its memory limit | stopped after
return {
  decide = function(step)
    local f = function() end
    while true do
      local g = f
      f = function()
        return g
      end
    end
  end,
}
