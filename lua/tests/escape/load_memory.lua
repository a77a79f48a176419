-- A gigabyte while loading.
-- expect: load over its memory limit
local s = string.rep("x", 2 ^ 30)
return {}
