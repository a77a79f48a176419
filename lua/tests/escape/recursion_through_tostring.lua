-- By way of tostring.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    local t
    t = setmetatable({}, { __tostring = function()
      return tostring(t)
    end })
    return "student", tostring(t)
  end,
}
