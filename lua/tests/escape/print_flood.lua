-- Printing for ever.
-- expect: hook stopped after
return {
  decide = function(step)
    while true do
      print("x")
    end
  end,
}
