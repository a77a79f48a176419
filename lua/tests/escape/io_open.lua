-- Files.
-- expect: hook raised an error
return {
  decide = function(step)
    return "student", io.open("/etc/passwd"):read()
  end,
}
