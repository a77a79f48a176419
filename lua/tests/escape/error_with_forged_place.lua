-- A message that looks like a place.
-- expect: hook raised an error
return {
  decide = function(step)
    error("error_with_forged_place.lua:999999999999: x", 0)
  end,
}
