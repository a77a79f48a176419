-- CVE-2022-24736 of Redis: an error object that is no text made the host follow a null pointer.
-- expect: hook raised an error
return {
  decide = function(step)
    error(setmetatable({}, {
      __index = function()
        error(nil)
      end,
      __tostring = function()
        error(setmetatable({}, { __tostring = false }))
      end,
    }), 2 ^ 31)
  end,
}
