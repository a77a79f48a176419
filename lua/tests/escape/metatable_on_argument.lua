-- A metatable on a frozen table.
-- expect: hook raised an error
return {
  decide = function(step)
    setmetatable(step, { __index = function() return "x" end })
    return "student"
  end,
}
