-- Old iteration with a callback.
-- expect: hook raised an error
return {
  decide = function(step)
    table.foreach({ 1 }, function() end)
    return "student"
  end,
}
