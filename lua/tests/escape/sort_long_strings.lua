-- Comparing two long strings that differ at the end, many times.
-- expect: hook stopped after
return {
  decide = function(step)
    local a, b = string.rep("x", 2e6) .. "a", string.rep("x", 2e6) .. "b"
    local t = {}
    for i = 1, 5000 do
      t[i] = if i % 2 == 0 then a else b
    end
    table.sort(t)
    return "student"
  end,
}
