-- The error object loops when it is made into text.
-- expect: hook stopped after
return {
  decide = function(step)
    error(setmetatable({}, { __tostring = function()
      while true do
      end
    end }))
  end,
}
