-- An endless loop under 150 catches.
-- expect: hook stopped after
return {
  decide = function(step)
    local function down(n)
      if n == 0 then
        while true do
        end
      end
      pcall(down, n - 1)
    end
    down(150)
    return "student"
  end,
}
