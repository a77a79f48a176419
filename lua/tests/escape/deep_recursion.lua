-- The stack.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    local function f()
      return 1 + f()
    end
    return "student", tostring(f())
  end,
}
