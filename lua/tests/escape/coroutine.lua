-- A coroutine would outlive the call that made it.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", coroutine.wrap(function()
      return "out"
    end)()
  end,
}
