-- Not chance, but not on the list.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", tostring(math.noise(0.5))
  end,
}
