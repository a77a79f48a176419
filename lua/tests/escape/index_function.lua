-- A field that takes for ever.
-- expect: hook stopped after
return {
  decide = function(step)
    return "student", setmetatable({}, { __index = function()
      while true do
      end
    end }).x
  end,
}
