-- CVE-2025-46818 of Redis: methods of strings were replaced for the scripts of others.
-- expect: hook raised an error
return {
  decide = function(step)
    local index = getmetatable("").__index
    index.upper = function()
      return "owned"
    end
    return "student", ("x"):upper()
  end,
}
