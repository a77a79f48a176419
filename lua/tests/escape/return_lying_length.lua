-- The same with __len and __iter.
-- expect: hook wrong value
return {
  decide = function(step)
    return setmetatable({ x = 1 }, { __len = function()
      return 1e9
    end, __iter = function()
      while true do
      end
    end })
  end,
}
