-- The handler raises, for ever.
-- expect: hook stopped after
return {
  decide = function(step)
    local function handler()
      error("again")
    end
    while true do
      xpcall(error, handler)
    end
  end,
}
