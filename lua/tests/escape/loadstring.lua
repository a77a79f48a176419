-- Code made at run time.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", loadstring("return 'out'")()
  end,
}
