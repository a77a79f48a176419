-- Comparing two long strings that differ at the end, many times.
-- expect: hook stopped after
return {
  decide = function(step)
    local million = string.rep("x", 1e6)
    local a, b = million .. million .. "a", million .. million .. "b"
    local t = {}
    for i = 1, 5000 do
      t[i] = if i % 2 == 0 then a else b
    end
    table.sort(t)
    return "student"
  end,
}
