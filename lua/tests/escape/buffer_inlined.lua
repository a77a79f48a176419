-- Reads of buffers are instructions; there is no buffer to read.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", tostring(buffer.readu8(buffer.create(8), 0))
  end,
}
