-- By way of a comparison.
-- expect: hook raised an error | stopped after
return {
  decide = function(step)
    local function f()
      table.sort({ 1, 2 }, f)
    end
    f()
    return "student"
  end,
}
