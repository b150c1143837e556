-- Runs in the cluster of one version, for every attempt: writes the version into the path or the message, adds TorchServe's
-- token, and names the version in the answer. NAME, VERSION, PATH, MEANT, TOKEN, FORM_AS_SENT and OURS are defined before this
-- text; MEANT is the version that was chosen, if this one substitutes for it.

local SERVICE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/"

local byte, char, sub = string.byte, string.char, string.sub

local function varint(value)
  local text = ""
  while value >= 128 do
    text = text .. char(value % 128 + 128)
    value = math.floor(value / 128)
  end
  return text .. char(value)
end

local function field(number, text)
  return char(number * 8 + 2) .. varint(#text) .. text
end

-- An entry of the map `input`: TorchServe passes no gRPC metadata to its workers.
local function entry(key, value)
  return value and field(3, field(1, key) .. field(2, value)) or ""
end

-- Milliseconds in each unit of `grpc-timeout`.
local UNITS = {n = 1e-6, u = 1e-3, m = 1, S = 1e3, M = 6e4, H = 3.6e6}

local function time_limit(headers)
  local number, unit = string.match(headers:get("grpc-timeout") or "", "^(%d+)([numSMH])$")
  return number and #number <= 8 and string.format("%d", math.max(1, math.ceil(tonumber(number) * UNITS[unit]))) or nil
end

local function put_into_message(handle)
  local body = handle:body()
  local headers = handle:headers() -- fetched again: a handle from before a wait is invalid
  local size = body:length() - 5
  local before, after = "", ""
  if OURS then
    -- At the front: an entry of the client's own comes later, and wins.
    before = entry("x-request-id", headers:get("x-request-id")) .. entry("traceparent", headers:get("traceparent")) ..
             entry("x-timeout-ms", time_limit(headers))
    after = entry("x-arrived-ms", headers:get("x-arrived-ms")) .. entry("x-door-token", headers:get("x-door-token"))
  end
  -- At the end: of a repeated scalar field, and of entries with the same key, the last one counts.
  after = after .. field(1, NAME) .. field(2, VERSION)
  local whole = #before + size + #after
  local length = char(math.floor(whole / 16777216) % 256, math.floor(whole / 65536) % 256,
                      math.floor(whole / 256) % 256, whole % 256)
  body:setBytes("\0" .. length .. before .. (size > 0 and body:getBytes(5, size) or "") .. after)
end

-- TorchServe would parse a form's fields; our workers get the body as it was sent.
local function keep_form(headers)
  local kind, more = string.match(headers:get("content-type") or "", "^%s*([^;%s]*)(.*)$")
  if string.lower(kind) == "application/x-www-form-urlencoded" then headers:replace("content-type", FORM_AS_SENT .. more) end
end

function envoy_on_request(handle)
  local headers = handle:headers()
  headers:replace("authorization", TOKEN)
  if not headers:get("x-door-first") then headers:replace("x-door-first", MEANT) end
  local path = headers:get(":path")
  if sub(path, 1, #SERVICE) == SERVICE then
    if path == SERVICE .. "Predictions" then
      handle:streamInfo():dynamicMetadata():set("door", "unary", true)
    end
    put_into_message(handle)
  else
    headers:replace(":path", PATH .. (headers:get("x-door-rest") or ""))
    if OURS then keep_form(headers) end
  end
end

function envoy_on_response(handle)
  local headers = handle:headers()
  headers:replace("x-model-version", VERSION)
  headers:remove("x-request-id") -- TorchServe's own; the front door's is the one that its worker logs
  if sub(headers:get("content-type") or "", 1, 16) ~= "application/grpc" then
    forgive_form(handle)
  elseif headers:get("grpc-status") then
    translate_status(headers)
  elseif OURS and (handle:streamInfo():dynamicMetadata():get("door") or {})["unary"] then
    fail_call(handle)
  end
end
