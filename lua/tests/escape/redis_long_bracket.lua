-- CVE-2025-46819 of Redis: a long bracket that never closes was read past its end.
-- expect: load redis_long_bracket.lua
return { decide = function() return "student", [==========[ never closed ]=========] end }
