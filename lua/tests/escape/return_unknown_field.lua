-- A misspelt field must not be ignored.
-- expect: hook wrong value
return {
  decide = function(step)
    return { who = "student", temprature = 1 }
  end,
}
