-- Redis' old sandbox: a global set through the environment's metatable outlived the script.
-- expect: hook raised an error
return {
  decide = function(step)
    setmetatable(_G, nil)
    rawset(_G, "planted", function()
      return "student"
    end)
    return planted()
  end,
}
