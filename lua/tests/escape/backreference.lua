-- Wildcards with a back reference.
-- expect: hook stopped after
return {
  decide = function(step)
    return "student", tostring(string.match(string.rep("a", 20000), "(.-)(.-)(.-)%1%2%3b"))
  end,
}
