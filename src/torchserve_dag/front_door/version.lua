-- Runs in the cluster of one version, for every attempt: writes the version into the path or the message, adds TorchServe's
-- token, and names the version in the answer. NAME, VERSION, MEANT, TOKEN and OURS are defined before this text; MEANT is
-- the version that was chosen, if this one substitutes for it.

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

local function put_into_message(handle)
  local body = handle:body()
  local headers = handle:headers() -- fetched again: a handle from before a wait is invalid
  local size = body:length() - 5
  local entries = ""
  if OURS then -- at the front: an entry of the client's own comes later, and wins
    entries = entry("x-request-id", headers:get("x-request-id")) .. entry("traceparent", headers:get("traceparent"))
  end
  local names = field(1, NAME) .. field(2, VERSION) -- at the end: of a repeated scalar field, the last one counts
  local whole = #entries + size + #names
  local length = char(math.floor(whole / 16777216) % 256, math.floor(whole / 65536) % 256,
                      math.floor(whole / 256) % 256, whole % 256)
  body:setBytes("\0" .. length .. entries .. (size > 0 and body:getBytes(5, size) or "") .. names)
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
    headers:replace(":path", "/predictions/" .. NAME .. "/" .. VERSION .. (headers:get("x-door-rest") or ""))
  end
end

-- The HTTP status of a failure in an answer's body: TorchServe's gRPC drops the status that a worker sets.
local function status_in(handle)
  local body = handle:body()
  local size = body and body:length() or 0
  local start = body and body:getBytes(0, math.min(size, 64)) or ""
  local at, _, code = string.find(start, '{"code": (%d%d%d), "type": "', 1)
  return at and at <= 12 and code or nil
end

-- gRPC status → HTTP status, for the router's metrics, retries and ejections.
local STATUS = {["1"] = "499", ["2"] = "500", ["4"] = "504", ["8"] = "507", ["13"] = "500", ["14"] = "503", ["15"] = "500"}

function envoy_on_response(handle)
  local headers = handle:headers()
  headers:replace("x-model-version", VERSION)
  headers:remove("x-request-id") -- TorchServe's own; the front door's is the one that its worker logs
  local kind = headers:get("content-type")
  if not kind or sub(kind, 1, 16) ~= "application/grpc" then return end
  local ended = headers:get("grpc-status")
  local status = ended and STATUS[ended]
  if not ended and (handle:streamInfo():dynamicMetadata():get("door") or {})["unary"] then
    status = status_in(handle)
  end
  if status then handle:headers():replace(":status", status) end
end
