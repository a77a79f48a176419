-- No message at all.
-- expect: hook raised an error
return {
  decide = function(step)
    error(nil)
  end,
}
