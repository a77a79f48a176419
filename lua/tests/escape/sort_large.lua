-- A sort without a comparison of its own is one call into the library: half a million elements.
-- expect: hook stopped after
return {
  decide = function(step)
    table.sort(table.create(260000, 1))
    return "student"
  end,
}
