-- Our own function for ever.
-- expect: hook stopped after
return {
  decide = function(step)
    while true do
      locum.hash(1, "x")
    end
  end,
}
