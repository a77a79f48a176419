-- A number is no verdict.
-- expect: hook wrong value
return {
  decide = function(step)
    return 1
  end,
}
