-- CVE-2018-11218 of Redis: a table that holds itself was packed without an end.
-- expect: hook returned a wrong value
return {
  decide = function(step)
    local t = { who = "student" }
    t.reason = t
    return t
  end,
}
