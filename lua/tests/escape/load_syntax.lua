-- A syntax error is named with its line.
-- expect: load load_syntax.lua:3
return { decide = function( }
