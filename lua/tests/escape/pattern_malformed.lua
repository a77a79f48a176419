-- A pattern that ends in its own escape.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", string.match("a", "[a%")
  end,
}
