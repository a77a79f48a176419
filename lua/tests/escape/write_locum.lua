-- Our own table.
-- expect: hook raised an error
return {
  decide = function(step)
    locum.hash = function() return 0 end
    return "student"
  end,
}
