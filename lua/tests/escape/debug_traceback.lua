-- So does a traceback.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", debug.traceback()
  end,
}
