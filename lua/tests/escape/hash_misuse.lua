-- Our own function with wrong arguments.
-- expect: answer blocked
return {
  decide = function(step)
    for _, bad in { {}, 0.5, 1 / 0, true, print } do
      if pcall(locum.hash, bad, "x") or pcall(locum.hash, 1, bad) and type(bad) ~= "string" then
        return "student"
      end
    end
    return "teacher", pcall(locum.hash) and "open" or "blocked"
  end,
}
