-- A separator between many.
-- expect: hook over its memory limit | stopped after
return {
  decide = function(step)
    return "student", table.concat(table.create(10000, "x"), string.rep("y", 10000))
  end,
}
