-- CVE-2025-46817 of Redis: unpack with a range that overflows.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    return "student", tostring(select("#", table.unpack({}, 1, 2 ^ 31 - 1)))
  end,
}
