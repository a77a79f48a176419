-- The collector tells the size of memory, which differs from run to run.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", tostring(collectgarbage("count"))
  end,
}
