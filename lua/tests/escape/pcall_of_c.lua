-- pcall on library functions, without a Lua function to stop in.
-- expect: hook stopped after
return {
  decide = function(step)
    while true do
      pcall(string.rep)
    end
  end,
}
