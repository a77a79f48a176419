-- Nor is a word that looks like one.
-- expect: hook wrong value
return {
  decide = function(step)
    return "Student"
  end,
}
