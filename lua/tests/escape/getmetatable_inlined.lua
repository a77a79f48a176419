-- The compiler inlines getmetatable without looking it up, so removing the global alone left it working.
-- expect: hook raised an error
return {
  decide = function(step)
    getmetatable("").__metatable = nil
    return "student"
  end,
}
