-- Nor does this one.
-- expect: load stopped after
while true do
  pcall(function()
    while true do
    end
  end)
end
return {}
