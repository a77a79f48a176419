-- A numeric for, which has an instruction of its own.
-- expect: hook stopped after
return {
  decide = function(step)
    for i = 1, 1e18 do
    end
  end,
}
