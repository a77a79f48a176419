-- Another environment for a library function.
-- expect: hook raised an error
return {
  decide = function(step)
    setfenv(1, {})
    return "student"
  end,
}
