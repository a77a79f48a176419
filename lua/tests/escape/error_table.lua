-- A table as the message.
-- expect: hook raised an error
return {
  decide = function(step)
    error({ secret = "x" })
  end,
}
