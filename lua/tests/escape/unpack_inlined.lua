-- The 5.1 global unpack is inlined too.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", tostring(unpack({ 1 }))
  end,
}
