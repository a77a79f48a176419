-- Luau keeps the frames of tail calls.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    local function f()
      return f()
    end
    return "student", tostring(f())
  end,
}
