-- Through an inlined library function.
-- expect: hook raised an error
return {
  decide = function(step)
    table.insert(step.tools, "rm")
    return "student"
  end,
}
