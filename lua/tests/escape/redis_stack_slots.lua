-- CVE-2021-32626 of Redis: more values than the stack had slots for.
-- expect: hook raised an error | stopped after | over its memory limit
return {
  decide = function(step)
    local t = table.create(250000, 1)
    local function all(...)
      return select("#", ...), ...
    end
    local n = 0
    for _ = 1, 64 do
      n += (all(table.unpack(t)))
    end
    return "student", string.char(table.unpack(t)) .. n
  end,
}
