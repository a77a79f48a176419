-- Two thousand million elements of an empty table: one call into the library.
-- expect: hook raised an error
return {
  decide = function(step)
    table.move({}, 1, 2 ^ 31 - 3, 2)
    return "student"
  end,
}
