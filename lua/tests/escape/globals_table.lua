-- The table of globals under its own name.
-- expect: hook raised an error
return {
  decide = function(step)
    _G.string = nil
    return "student"
  end,
}
