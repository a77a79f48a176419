-- Its other spelling.
-- expect: hook stopped after
return {
  decide = function(step)
    repeat
      local x = 1
    until x == 2
  end,
}
