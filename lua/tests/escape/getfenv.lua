-- The environment of a caller.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", tostring(getfenv(1))
  end,
}
