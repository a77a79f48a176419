-- A hook that cannot be called.
-- expect: load decide must be a function, found string
return { decide = "student" }
