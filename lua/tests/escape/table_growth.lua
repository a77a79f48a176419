-- A list that grows for ever.
-- expect: hook over its memory limit | stopped after
return {
  decide = function(step)
    local t = {}
    while true do
      t[#t + 1] = t
    end
  end,
}
