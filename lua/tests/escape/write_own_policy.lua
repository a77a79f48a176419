-- A hook replaces its neighbour.
-- expect: hook raised an error
local M = {}
function M.decide(step)
  M.accept = function()
    return "keep"
  end
  return "student"
end
return M
