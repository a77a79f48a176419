-- Nothing is no verdict.
-- expect: hook wrong value
return {
  decide = function(step)
    return
  end,
}
