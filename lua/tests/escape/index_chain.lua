-- A chain of __index that bites its tail.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    local t = {}
    t.__index = t
    setmetatable(t, t)
    return "student", t.x
  end,
}
