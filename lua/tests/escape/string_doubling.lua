-- The same by doubling.
-- expect: hook over its memory limit | stopped after
return {
  decide = function(step)
    local s = "x"
    while true do
      s = s .. s
    end
  end,
}
