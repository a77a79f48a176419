-- A width that no buffer has.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", string.format("%99999d", 1)
  end,
}
