-- Every level catches its stop twice.
-- expect: hook stopped after
return {
  decide = function(step)
    local function f()
      pcall(f)
      pcall(f)
    end
    while true do
      f()
    end
  end,
}
