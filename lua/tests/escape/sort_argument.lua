-- Through sort, which writes in place.
-- expect: hook raised an error
return {
  decide = function(step)
    table.sort(step.tools)
    return "student"
  end,
}
