-- Data that contains itself.
-- expect: load nested deeper than
local settings = {}
settings.curate = settings
return { settings = settings }
