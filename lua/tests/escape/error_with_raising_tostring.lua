-- It raises when it is made into text.
-- expect: hook raised an error
return {
  decide = function(step)
    error(setmetatable({}, { __tostring = function()
      error("again")
    end }))
  end,
}
