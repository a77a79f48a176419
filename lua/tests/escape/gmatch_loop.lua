-- A matcher that is begun again and again.
-- expect: hook stopped after
return {
  decide = function(step)
    while true do
      for word in string.gmatch("a b c", "%a*") do
      end
    end
  end,
}
