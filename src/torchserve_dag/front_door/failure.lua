-- Before version.lua: gives the failures in TorchServe's answers the status that they mean. OURS is defined before this text.

local byte, char, sub = string.byte, string.char, string.sub

-- gRPC status → HTTP status, for the router's metrics, retries and ejections.
local HTTP = {["1"] = "499", ["2"] = "500", ["4"] = "504", ["8"] = "507", ["13"] = "500", ["14"] = "503", ["15"] = "500"}

-- HTTP status → gRPC status. Another 4xx is 3 (INVALID_ARGUMENT), another 5xx is 13 (INTERNAL).
local GRPC = {["401"] = "16", ["403"] = "7", ["404"] = "5", ["408"] = "4", ["409"] = "10", ["413"] = "8", ["429"] = "8",
              ["499"] = "1", ["501"] = "12", ["503"] = "14", ["504"] = "4", ["507"] = "8"}

local MAX_FAILURE = 65536

-- What a PredictionResponse holds: its one field, of bytes.
local function prediction(message)
  local at, length, scale = 2, 0, 1
  if byte(message, 1) ~= 10 then return "" end
  repeat
    local b = byte(message, at) or 0
    length, scale, at = length + (b % 128) * scale, scale * 128, at + 1
  until b < 128
  return sub(message, at, at + length - 1)
end

local function percent(c) return string.format("%%%02X", byte(c)) end

-- A JSON string from the character after its first quote, as grpc-message is written: UTF-8, percent-encoded.
local function as_grpc_message(text)
  local plain, at = {}, 1
  while at <= #text and sub(text, at, at) ~= '"' do
    local c = sub(text, at, at)
    if c == "\\" then
      c, at = sub(text, at + 1, at + 1), at + 1
      if c == "u" then
        local code = tonumber(sub(text, at + 1, at + 4), 16) or 63
        at = at + 4
        if code < 128 then c = char(code)
        elseif code < 2048 then c = char(192 + math.floor(code / 64), 128 + code % 64)
        elseif code >= 55296 and code < 57344 then c = "?" -- half of a character beyond 16 bits
        else c = char(224 + math.floor(code / 4096), 128 + math.floor(code / 64) % 64, 128 + code % 64) end
      elseif c == "n" then c = "\n" elseif c == "t" then c = "\t" elseif c == "r" then c = "\r" end
    end
    plain[#plain + 1] = c
    at = at + 1
  end
  return (string.gsub(table.concat(plain), "[^\32-\36\38-\126]", percent))
end

-- A worker's failure over gRPC, which TorchServe delivers as an ordinary answer: the call fails as the failure says.
-- `x-failure` is the failure as its worker wrote it.
local function fail_call(handle)
  local body = handle:body()
  local size = body and body:length() or 0
  if size < 16 or size > MAX_FAILURE then return end
  local text = prediction(body:getBytes(5, size - 5))
  local code = string.match(text, '^{"code": ([45]%d%d), "type": "')
  if not code then return end
  local trailers = handle:trailers()
  if not trailers then return end
  body:setBytes("")
  local start = select(2, string.find(text, '"message": "', 1, true))
  trailers:replace("grpc-status", GRPC[code] or (sub(code, 1, 1) == "4" and "3" or "13"))
  trailers:replace("grpc-message", start and as_grpc_message(sub(text, start + 1)) or "")
  if #text <= 4000 then trailers:replace("x-failure", text) end
  handle:headers():replace(":status", code)
end

-- TorchServe's own failure over gRPC. Where no worker takes the request, its queue is full: 503 over REST, INTERNAL over gRPC.
local function translate_status(headers)
  local message = headers:get("grpc-message") or ""
  if headers:get("grpc-status") == "13" and string.find(message, "has no worker to serve", 1, true) then
    headers:replace("grpc-status", "14")
  end
  local status = HTTP[headers:get("grpc-status")]
  if status then headers:replace(":status", status) end
end

-- A form that TorchServe cannot read is the client's mistake: TorchServe calls it 500, or 403.
local function forgive_form(handle)
  local status = handle:headers():get(":status")
  local size = tonumber(handle:headers():get("content-length") or "")
  if (status ~= "500" and status ~= "403") or not size or size > MAX_FAILURE then return end
  local body = handle:body()
  local text = body and body:getBytes(0, body:length()) or ""
  local kind = string.match(text, '^%s*{%s*"code":%s*' .. status .. ',%s*"type":%s*"(%w+)"')
  if kind and (string.find(kind, "DecoderException$") or (status == "403" and kind == "IllegalArgumentException")) then
    local said = string.gsub(text, status, "400", 1)
    body:setBytes(said)
    handle:headers():replace("content-length", tostring(#said))
    handle:headers():replace(":status", "400")
  end
end
