-- Keeps personal data out of the record: e-mail addresses, long runs of digits (cards, accounts, telephone numbers) and
-- strings that look like keys are replaced before anything is written, so that no student can learn them either.
--
-- Each replacement depends on what it replaces (`<email:3f>`), so that two addresses stay two and the student still sees
-- which is which. Redaction is idempotent: a second pass changes nothing. Everything but `redact` and `curate` is the built-in
-- default; to combine this file with another policy, copy `redact` and what is above it.

local M = {}

M.min_digits = 8     -- shorter runs are amounts, years and room numbers
M.min_key_length = 24
-- Prefixes that stand for a key whatever its length.
M.key_prefixes = { "sk-", "pk-", "ghp_", "gho_", "github_pat_", "xoxb-", "xoxp-", "AKIA", "ASIA", "AIza", "eyJ" }

--- A short name for a secret: enough to tell two apart, far too little to find one.
local function mark(kind, secret)
  return string.format("<%s:%02x>", kind, math.floor(locum.hash(kind, secret) * 256))
end

-- From each `@` with a domain behind it, the local part is taken back. A pattern with the local part in front would be tried
-- at each place of each long word, which takes the square of its length.
local function hide_emails(text)
  local out, from = {}, 1
  local at, last = string.find(text, "@[%w%-]+%.[%w%.%-]*%w")
  while at do
    local before = string.reverse(string.sub(text, math.max(from, at - 64), at - 1))
    local first = at - #string.match(before, "^[%w%._%%%+%-]*")
    if first < at then
      table.insert(out, string.sub(text, from, first - 1))
      table.insert(out, mark("email", string.lower(string.sub(text, first, last))))
      from = last + 1
    end
    at, last = string.find(text, "@[%w%-]+%.[%w%.%-]*%w", last + 1)
  end
  table.insert(out, string.sub(text, from))
  return table.concat(out)
end

local function hide_digits(text)
  -- Digits with single spaces, dots or dashes between groups.
  return (string.gsub(text, "%d[%d %.%-]*%d", function(run)
    local digits, count = string.gsub(run, "%D", "")
    if count == #run - #digits and #digits >= M.min_digits and not string.find(run, "[ %.%-][ %.%-]") then
      return mark("digits", digits)
    end
    return nil
  end))
end

-- Letters and digits mixed, long, with both cases or a digit in every few characters: no word of a language.
local function looks_random(word)
  word = string.sub(word, 1, 256)
  local _, digits = string.gsub(word, "%d", "")
  local _, upper = string.gsub(word, "%u", "")
  local _, lower = string.gsub(word, "%l", "")
  return digits * 8 >= #word and upper + lower >= 4
end

local function hide_keys(text)
  -- Twenty characters in the pattern keep ordinary words from ever reaching the function.
  return (string.gsub(text, string.rep("[%w_%-]", 12) .. "[%w_%-]*", function(word)
    for _, prefix in ipairs(M.key_prefixes) do
      if string.sub(word, 1, #prefix) == prefix then
        return mark("key", word)
      end
    end
    if #word >= M.min_key_length and looks_random(word) then
      return mark("key", word)
    end
    return nil
  end))
end

--- The text to record. Keys go first: their digits must not be taken for numbers.
function M.redact(text)
  return hide_digits(hide_emails(hide_keys(text.content)))
end

--- An episode in which half of the steps were refused by their tools may be one whose arguments we redacted.
function M.curate(episode)
  if episode.status ~= "success" or not episode.teacher or #episode.integrity_flags > 0 then
    return false, "not a clean success of the teacher"
  end
  return true, "a clean success"
end

function M.selftest()
  local function redacted(content)
    return (M.redact { role = "tool", content = content })
  end
  local function hides(secret, before, after)
    local once = redacted((before or "") .. secret .. (after or ""))
    if string.find(once, secret, 1, true) then
      error("not hidden: " .. secret, 2)
    end
    if before and string.sub(once, 1, #before) ~= before or after and string.sub(once, -#after) ~= after then
      error("hid too much: " .. once, 2)
    end
    if redacted(once) ~= once then
      error("a second pass changed " .. once .. " to " .. redacted(once), 2)
    end
  end
  local function keeps(content)
    if redacted(content) ~= content then
      error(string.format("changed %q to %q", content, redacted(content)), 2)
    end
  end
  hides("ada.lovelace+notes@example.co.uk", "write to ", ", please")
  hides("a@b.de", "<", ">")
  hides("ADA@EXAMPLE.COM")
  hides("4111 1111 1111 1111", "card ", " expires")
  hides("+49 30 1234567", "call ")
  hides("DE89370400440532013000", "IBAN ")
  hides("2024-0011-2233", "no. ", ".")
  hides("sk-abcdef0123456789abcdef", "key=", ";")
  hides("ghp_16C7e42F292c6912E7710c838347Ae178B4a", "token ")
  hides("AKIAIOSFODNN7EXAMPLE", "id ")
  hides("eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9", "Bearer ")
  hides("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "sha ")
  hides("0123456789abcdef0123456789abcdef", '"password": "', '"')
  keeps("")
  keeps("2 keys, 3 doors, 1 box; it is 2026 and costs 1499.50")
  keeps("internationalisation-of-the-documentation, is_a_long_snake_case_name")
  keeps("meet me @ noon, @home or user@localhost")
  keeps("You see a red ball 3 steps forward and 2 steps left.")
  keeps("12 34 56")
  local two = redacted("a@x.org b@x.org a@x.org")
  local first, second, third = string.match(two, "^(%S+) (%S+) (%S+)$")
  if first ~= third or first == second then
    error("addresses were not told apart: " .. two)
  end
end

return M
