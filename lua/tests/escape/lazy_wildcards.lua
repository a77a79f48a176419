-- One call of find that takes years: nine lazy wildcards.
-- expect: hook stopped after
return {
  decide = function(step)
    return "student", tostring(string.find(string.rep("a", 30000), ".-.-.-.-.-.-.-.-.-b"))
  end,
}
