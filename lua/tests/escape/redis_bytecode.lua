-- CVE-2015-4335 of Redis: bytecode made at run time read and wrote any memory.
-- expect: hook raised an error
return {
  decide = function(step)
    local asnum = loadstring(string.dump(function(x)
      for i = x, x, 0 do
        return i
      end
    end):gsub("\x60%z%z\x80", "\x16\0\0\x80"))
    return "student", asnum("x")
  end,
}
