-- More tokens than a reply may have.
-- expect: hook wrong value
return {
  decide = function(step)
    return { who = "student", max_tokens = 1e9 }
  end,
}
