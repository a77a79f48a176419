-- CVE-2018-11219 and CVE-2020-14147 of Redis: sizes in the format of `struct` overflowed.
-- expect: answer blocked
return {
  decide = function(step)
    local formats = { "i2147483648", "I4294967296", "!2147483647i16", "c9223372036854775807", "s999999999", "i0", "!0", "<>=!17i17", "z" }
    for _, format in formats do
      if pcall(string.unpack, format, string.rep("x", 64), 2 ^ 31) then
        return "student", format
      end
      if pcall(string.packsize, format .. format) and format ~= "z" then
        return "student", format
      end
    end
    return "teacher", "blocked"
  end,
}
