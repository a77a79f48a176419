-- rawset is inlined by the compiler as well; it would pass by __newindex.
-- expect: hook raised an error
return {
  decide = function(step)
    rawset({}, "x", 1)
    return "student"
  end,
}
