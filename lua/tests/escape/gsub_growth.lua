-- A replacement a thousand times its text.
-- expect: hook over its memory limit | stopped after
return {
  decide = function(step)
    return "student", (string.gsub(string.rep("x", 50000), "x", string.rep("%0", 1000)))
  end,
}
