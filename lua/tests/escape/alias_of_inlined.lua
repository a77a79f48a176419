-- The same through a local alias, which the compiler follows.
-- expect: hook raised an error
return {
  decide = function(step)
    local b = vector
    return "student", tostring(b.create(1, 2, 3))
  end,
}
