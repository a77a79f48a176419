-- Through the library.
-- expect: hook raised an error
return {
  decide = function(step)
    table.clear(step.tools)
    return "student"
  end,
}
