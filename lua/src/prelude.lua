-- Replacements that the sandbox puts over Luau's own functions, run once in a new state before it is frozen.
-- They exist for two reasons: no address may leak into a string, because it differs from run to run; and no single call into
-- the library may run longer than its caller's time limit, because the interrupt is asked between such calls and not in them
-- (the pattern matcher asks on every step, but not inside a character class or a plain search).
local bounds = ... -- { work = n }: byte pairs that one search may compare. Rust raises it for large redactions.

local type, select, error, pcall = type, select, error, pcall
local raw_tostring = tostring
local find, match, gmatch, gsub, split, format = string.find, string.match, string.gmatch, string.gsub, string.split, string.format
local move, sort, pack, unpack = table.move, table.sort, table.pack, table.unpack
local MAX_MOVE = 65536
-- What a step may hold, and what takes about a millisecond.
local MAX_TEXT, MAX_LIST = 2^20, 2^18

local function length(v)
  local t = type(v)
  return if t == "string" then #v elseif t == "number" then 32 else 0
end

local function check_work(name, s, pattern)
  -- Short against short is never a danger; the product is.
  if length(s) * length(pattern) > bounds.work then
    error("string." .. name .. ": text and pattern are too long together", 3)
  end
end

function string.find(s, pattern, ...)
  check_work("find", s, pattern)
  return find(s, pattern, ...)
end

function string.match(s, pattern, ...)
  check_work("match", s, pattern)
  return match(s, pattern, ...)
end

function string.gmatch(s, pattern)
  check_work("gmatch", s, pattern)
  return gmatch(s, pattern)
end

function string.gsub(s, pattern, ...)
  check_work("gsub", s, pattern)
  return gsub(s, pattern, ...)
end

function string.split(s, separator)
  check_work("split", s, separator)
  return split(s, separator)
end

-- Functions that walk over a whole text or list without asking for the interrupt.
local function bounded(library, name, most, what)
  local whole = library[name]
  library[name] = function(v, ...)
    if (type(v) == "string" or type(v) == "table") and #v > most then
      error(name .. ": at most " .. most .. " " .. what, 2)
    end
    return whole(v, ...)
  end
end

for _, name in { "reverse", "upper", "lower" } do
  bounded(string, name, MAX_TEXT, "bytes")
end
for _, name in { "len", "codepoint", "offset" } do
  bounded(utf8, name, MAX_TEXT, "bytes")
end
for _, name in { "concat", "remove", "insert", "clone" } do
  bounded(table, name, MAX_LIST, "elements")
end

-- What makes a large one at once.
local rep = string.rep
function string.rep(s, n, ...)
  if type(n) == "number" and length(s) * n > MAX_TEXT then
    error("rep: at most " .. MAX_TEXT .. " bytes", 2)
  end
  return rep(s, n, ...)
end

local create = table.create
function table.create(n, ...)
  if type(n) == "number" and n > MAX_LIST then
    error("create: at most " .. MAX_LIST .. " elements", 2)
  end
  return create(n, ...)
end

-- A table has no order that a policy may rely on, and its address is noise.
local function safe_tostring(v)
  local s = raw_tostring(v)
  local t = type(v)
  if t ~= "string" and match(s, "^%a+: 0x%x+$") then
    return t
  end
  return s
end

function tostring(...)
  if select("#", ...) == 0 then
    error("missing argument #1 to 'tostring'", 2)
  end
  return safe_tostring((...))
end

function string.format(f, ...)
  for i = 1, select("#", ...) do
    if length((select(i, ...))) > MAX_TEXT then
      error("format: at most " .. MAX_TEXT .. " bytes", 2)
    end
  end
  for i = 1, select("#", ...) do
    local t = type((select(i, ...)))
    if t ~= "string" and t ~= "number" and t ~= "boolean" and t ~= "nil" then
      local values = pack(...)
      for k = i, values.n do
        local v = values[k]
        local tv = type(v)
        if tv ~= "string" and tv ~= "number" and tv ~= "boolean" and tv ~= "nil" then
          values[k] = safe_tostring(v)
        end
      end
      return format(f, unpack(values, 1, values.n))
    end
  end
  return format(f, ...)
end

function table.move(from, first, last, at, to)
  if type(first) == "number" and type(last) == "number" and last - first >= MAX_MOVE then
    error("table.move: at most " .. MAX_MOVE .. " elements", 2)
  end
  return move(from, first, last, at, to)
end

-- The comparison is always a Lua function, so that a long sort can be stopped between two of them.
function table.sort(t, less)
  if less == nil then
    sort(t, function(a, b)
      return a < b
    end)
  elseif type(less) == "function" then
    sort(t, function(a, b)
      return (less(a, b))
    end)
  else
    error("invalid argument #2 to 'sort' (function expected)", 2)
  end
end

local hash = locum.hash
locum.hash = function(seed, text)
  local ts = type(seed)
  if ts ~= "string" and (ts ~= "number" or seed % 1 ~= 0 or seed > 2^53 or seed < -2^53) then
    error("locum.hash: seed must be a string or a whole number", 2)
  end
  if type(text) ~= "string" then
    error("locum.hash: text must be a string", 2)
  end
  return hash(ts == "number" and format("%d", seed) or seed, text)
end

-- How Rust enters a hook: its argument is made unchangeable, all the way down (the depth is bounded by the serializer that
-- made it). Done here because it takes a tenth of the time that it takes from outside.
local freeze, isfrozen = table.freeze, table.isfrozen
local function freeze_all(t)
  for _, v in t do
    if type(v) == "table" and not isfrozen(v) then
      freeze_all(v)
    end
  end
  freeze(t)
end

local function enter(hook, argument)
  freeze_all(argument)
  return hook(argument)
end

-- The argument of `decide`: of all hooks the one that a host waits for at every step, and fields are set here in a fraction of
-- the time that it takes from outside.
local function step(task, domain, turn, tools, prompt_bytes, novelty, deadline_ms, student, stage)
  return {
    task = task,
    domain = domain,
    turn = turn,
    tools = tools,
    prompt_bytes = prompt_bytes,
    novelty = novelty,
    deadline_ms = deadline_ms,
    student = student,
    stage = stage,
  }
end

return enter, step
