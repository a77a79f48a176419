-- Other files.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", tostring(require("./default"))
  end,
}
