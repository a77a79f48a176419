-- The policy's table is read raw, so a metatable does not make hooks.
-- expect: builtin
return setmetatable({}, {
  __index = function()
    return function()
      return "student"
    end
  end,
})
