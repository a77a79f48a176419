-- A gigabyte while loading.
-- expect: load over its memory limit
local s = string.rep("x", 2 ^ 20)
for _ = 1, 10 do
  s ..= s
end
return {}
