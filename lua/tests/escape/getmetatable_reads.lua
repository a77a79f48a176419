-- The same, only reading: the metatable of strings is the door to the string library of everybody.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", type(getmetatable("").__index)
  end,
}
