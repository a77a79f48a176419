-- The debug library sees callers.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", debug.info(1, "s")
  end,
}
