-- Nothing that could be a policy.
-- expect: load must return one table, found number
return 7
