-- The file itself never ends.
-- expect: load stopped after
while true do
end
return {}
