-- The 5.2 name of the same.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", load("return 'out'")()
  end,
}
