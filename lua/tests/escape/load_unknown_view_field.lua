-- A misspelt field of the view.
-- expect: load unknown field `stepsback`
return { view = { stepsback = 3 } }
