-- Keys far apart, so that the hash part of a table grows and is filled anew again and again.
-- expect: hook stopped after | over its memory limit
return {
  decide = function(step)
    local t = {}
    for i = 1, 1e7 do
      t[i * 2 ^ 40] = i
    end
    return "student"
  end,
}
