-- Reading the verdict must not run code of the script.
-- expect: hook wrong value
return {
  decide = function(step)
    return setmetatable({}, { __index = function()
      while true do
      end
    end })
  end,
}
