-- A vector made by an instruction.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", tostring(vector.create(1, 2, 3))
  end,
}
