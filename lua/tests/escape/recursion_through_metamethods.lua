-- By way of a field.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    local t = setmetatable({}, { __index = function(t, k)
      return t[k .. "x"]
    end })
    return "student", t.a
  end,
}
