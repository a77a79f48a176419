-- The address of a table differs from run to run.
-- expect: answer blocked
return {
  decide = function(step)
    local s = tostring({}) .. tostring(print) .. tostring(function() end)
    return "teacher", s == "tablefunctionfunction" and "blocked" or s
  end,
}
