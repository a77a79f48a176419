-- A function as the reason.
-- expect: hook wrong value
return {
  decide = function(step)
    return "student", print
  end,
}
