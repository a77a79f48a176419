-- An iterator that never ends.
-- expect: hook stopped after
return {
  decide = function(step)
    for _ in function()
      return 1
    end do
    end
  end,
}
