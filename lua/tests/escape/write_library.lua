-- A library function replaced for everybody.
-- expect: hook raised an error
return {
  decide = function(step)
    string.find = function() return nil end
    return "student"
  end,
}
