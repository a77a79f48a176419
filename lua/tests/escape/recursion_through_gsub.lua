-- The C stack, by way of the library's callbacks.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    local function f()
      return (string.gsub("x", "x", f))
    end
    return "student", f()
  end,
}
