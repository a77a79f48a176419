-- Through move.
-- expect: hook raised an error
return {
  decide = function(step)
    table.move({ "rm" }, 1, 1, 1, step.tools)
    return "student"
  end,
}
