-- The same through __iter.
-- expect: hook stopped after
return {
  decide = function(step)
    for _ in setmetatable({}, { __iter = function()
      return function()
        return 1
      end
    end }) do
    end
  end,
}
