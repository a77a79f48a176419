-- A value kept for the next call under a global name.
-- expect: hook raised an error
return {
  decide = function(step)
    counter = (counter or 0) + 1
    return "student", tostring(counter)
  end,
}
