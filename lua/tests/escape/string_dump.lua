-- Bytecode of a function.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", string.dump(function() end)
  end,
}
