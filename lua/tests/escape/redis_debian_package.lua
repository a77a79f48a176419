-- CVE-2022-0543 of Redis on Debian: `package.loadlib` was left behind and opened a shared library.
-- expect: hook raised an error
return {
  decide = function(step)
    local open = package.loadlib("/usr/lib/x86_64-linux-gnu/liblua5.1.so.0", "luaopen_io")
    return "student", open().popen("id"):read("*a")
  end,
}
