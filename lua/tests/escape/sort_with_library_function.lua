-- A library function as the comparison: no Lua function to stop in.
-- expect: hook stopped after
return {
  decide = function(step)
    table.sort(table.create(260000, "x"), rawequal)
    return "student"
  end,
}
