-- CVE-2025-46818 of Redis: the metatables of basic types were open.
-- expect: hook raised an error
return {
  decide = function(step)
    setmetatable("", { __index = {} })
    return "student"
  end,
}
