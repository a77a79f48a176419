-- Greedy wildcards.
-- expect: hook stopped after
return {
  decide = function(step)
    return "student", tostring(string.match(string.rep("a", 30000), "(a*)(a*)(a*)(a*)(a*)b"))
  end,
}
