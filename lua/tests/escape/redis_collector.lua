-- CVE-2024-46981 and CVE-2025-49844 of Redis: the collector was driven by hand until it freed what was still in use.
-- expect: hook raised an error
return {
  decide = function(step)
    for i = 1, 1000 do
      local proxy = newproxy(true)
      getmetatable(proxy).__gc = function()
        collectgarbage("collect")
      end
    end
    collectgarbage("collect")
    return "student"
  end,
}
