-- A temperature that is no number.
-- expect: hook wrong value
return {
  decide = function(step)
    return { who = "student", temperature = 0 / 0 }
  end,
}
