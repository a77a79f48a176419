-- A misspelt hook would never be called.
-- expect: load desire is no hook
return {
  desire = function() end,
}
