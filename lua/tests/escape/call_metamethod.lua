-- A chain of __call.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    local t = {}
    setmetatable(t, { __call = t })
    t()
    return "student"
  end,
}
