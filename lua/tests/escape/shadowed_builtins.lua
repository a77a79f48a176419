-- A policy may shadow a library for itself; methods of strings do not follow.
-- expect: answer blocked
string = {
  find = function()
    return 99
  end,
}
return {
  decide = function(step)
    local at = ("abc"):find("c")
    return "teacher", at == 3 and "blocked" or "shadowed"
  end,
}
