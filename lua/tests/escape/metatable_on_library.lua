-- A metatable on a library.
-- expect: hook raised an error
return {
  decide = function(step)
    setmetatable(string, { __index = function() return print end })
    return "student"
  end,
}
