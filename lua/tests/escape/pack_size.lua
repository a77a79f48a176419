-- A record of two thousand million bytes.
-- expect: hook raised an error | over its memory limit | stopped after
return {
  decide = function(step)
    return "student", string.pack("c2147483647", "x")
  end,
}
