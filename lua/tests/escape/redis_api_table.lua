-- CVE-2022-24735 of Redis: the table of the host's own functions was writable, so another user's script ran the attacker's.
-- expect: hook raised an error
return {
  decide = function(step)
    local hash = locum.hash
    locum.hash = function()
      return 0
    end
    return "student", tostring(hash("a", "b"))
  end,
}
