-- Userdata with a metatable of its own.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", tostring(newproxy(true))
  end,
}
