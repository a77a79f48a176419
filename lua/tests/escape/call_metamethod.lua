-- A chain of __call.
-- expect: hook raised an error
return {
  decide = function(step)
    local t = {}
    setmetatable(t, { __call = t })
    t()
    return "student"
  end,
}
