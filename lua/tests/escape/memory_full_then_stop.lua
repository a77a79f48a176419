-- Memory is full when the stop comes, so that the stop itself has no room for its message.
-- expect: hook stopped after | over its memory limit | raised an error
return {
  decide = function(step)
    local t = {}
    pcall(function()
      while true do
        t[#t + 1] = string.rep("x", 100000) .. #t
      end
    end)
    pcall(function()
      while true do
        t[#t + 1] = {}
      end
    end)
    while true do
    end
  end,
}
