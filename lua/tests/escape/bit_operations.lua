-- CVE-2024-31449 of Redis: the bit library with arguments out of range.
-- expect: answer blocked
return {
  decide = function(step)
    local ok = pcall(function()
      for _, n in { -1, 32, 2 ^ 31, 2 ^ 53, -2 ^ 53, 0 / 0, 1 / 0 } do
        bit32.lshift(n, n)
        bit32.rshift(n, n)
        bit32.arshift(n, n)
        bit32.bnot(n)
        pcall(bit32.extract, n, n, n)
        pcall(bit32.replace, n, n, n, n)
      end
    end)
    return "teacher", ok and "blocked" or "raised"
  end,
}
