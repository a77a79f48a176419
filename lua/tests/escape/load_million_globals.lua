-- A million globals.
-- expect: load over its memory limit | stopped after
for i = 1, 1e6 do
  local name = "g" .. i
  t = t or {}
  t[name] = { name }
end
return {}
