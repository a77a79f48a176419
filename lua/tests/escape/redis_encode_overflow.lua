-- CVE-2022-24834 of Redis: a text whose encoded size overflowed a 32-bit length.
-- expect: hook over its memory limit | stopped after | raised an error
return {
  decide = function(step)
    local text = string.rep("\1", 1024 * 1024)
    return "student", string.format("%q", text .. text) .. string.rep(text, 256)
  end,
}
