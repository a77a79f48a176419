-- The same through format and interpolation.
-- expect: answer blocked
return {
  decide = function(step)
    local s = string.format("%s %s", {}, print) .. ` {step.tools}` .. ("%*"):format({})
    return "teacher", s == "table function tabletable" and "blocked" or s
  end,
}
