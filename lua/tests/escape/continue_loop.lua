-- A loop of nothing but continue.
-- expect: hook stopped after
return {
  decide = function(step)
    while true do
      continue
    end
  end,
}
