-- A comparison that takes for ever.
-- expect: hook stopped after
return {
  decide = function(step)
    local mt = { __eq = function()
      while true do
      end
    end }
    return "student", tostring(setmetatable({}, mt) == setmetatable({}, mt))
  end,
}
