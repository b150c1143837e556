-- Runs for every request: reads the model's name and version from the path (REST) or the message (gRPC), and writes both
-- into headers, by which the request is routed. (Headers of these names that a client sends are already removed.)

local SERVICE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/"
local OPEN_INFERENCE = "/inference.GRPCInferenceService/" -- its messages, too, have the name in field 1 and the version in 2
local CALLS = {[SERVICE .. "Predictions"] = true, [SERVICE .. "StreamPredictions"] = true,
               [OPEN_INFERENCE .. "ModelInfer"] = true, [OPEN_INFERENCE .. "ModelReady"] = true,
               [OPEN_INFERENCE .. "ModelMetadata"] = true}
local MODEL, VERSION, REST = "x-door-model", "x-door-version", "x-door-rest"
local METHODS = {GET = true, POST = true, PUT = true}
local byte, sub = string.byte, string.sub

-- A protobuf varint at `at`, and the position after it; nil if the text is too short.
local function varint(text, at)
  local value, scale = 0, 1
  for i = at, at + 9 do
    local b = byte(text, i)
    if not b then return nil end
    value = value + (b % 128) * scale
    if b < 128 then return value, i + 1 end
    scale = scale * 128
  end
  return nil
end

-- The fields 1 and 2 of a PredictionsRequest, model_name and model_version; nil if the text is no message.
local function name_and_version(text)
  local name, version = "", ""
  local at, last = 1, #text
  while at <= last do
    local key, size
    key, at = varint(text, at)
    if not key then return nil end
    local wire, field = key % 8, math.floor(key / 8)
    if wire == 0 then
      size, at = varint(text, at)
      if not size then return nil end
    elseif wire == 1 then
      at = at + 8
    elseif wire == 5 then
      at = at + 4
    elseif wire == 2 then
      size, at = varint(text, at)
      if not size or at + size - 1 > last then return nil end
      if field == 1 then name = sub(text, at, at + size - 1) end
      if field == 2 then version = sub(text, at, at + size - 1) end
      at = at + size
    else
      return nil
    end
  end
  if at ~= last + 1 then return nil end
  return name, version
end

local function over_grpc(headers)
  return sub(headers:get("content-type") or "", 1, 16) == "application/grpc"
end

-- Answers instead of TorchServe. Over REST the local replies make JSON of the kind and the message.
local function refuse(handle, status, grpc_status, kind, message)
  if over_grpc(handle:headers()) then
    handle:respond({[":status"] = "200", ["content-type"] = "application/grpc", ["grpc-status"] = grpc_status,
                    ["grpc-message"] = message .. "%0A" .. kind}, nil) -- TorchServe, too, names the kind in the last line
  else
    local metadata = handle:streamInfo():dynamicMetadata()
    metadata:set("refused", "type", kind)
    metadata:set("refused", "message", message)
    handle:respond({[":status"] = status}, "")
  end
end

-- Whether a name fits into a header: printable ASCII, at most 256 characters.
local function sane(text)
  return #text <= 256 and not string.find(text, "[^\33-\126]")
end

local function frame(size)
  return "\0" .. string.char(math.floor(size / 16777216) % 256, math.floor(size / 65536) % 256,
                             math.floor(size / 256) % 256, size % 256)
end

local function from_message(handle)
  local body = handle:body()
  local size = body and body:length() or 0
  local headers = handle:headers() -- fetched here: a handle from before a wait is invalid
  local inflated = headers:get("x-door-inflated")
  if inflated then -- unpack.lua has taken the message out of its frame
    if size ~= tonumber(inflated) then
      return refuse(handle, "400", "3", "BadRequestException", "The message cannot be decompressed.")
    end
    body:setBytes(frame(size) .. (size > 0 and body:getBytes(0, size) or ""))
    size = size + 5
  end
  if size < 5 then
    return refuse(handle, "400", "3", "BadRequestException", "The call holds no message.")
  end
  local head = body:getBytes(0, 5)
  if byte(head, 1) ~= 0 then
    return refuse(handle, "415", "12", "BadRequestException", "The message is compressed, and no grpc-encoding says how.")
  end
  if head ~= frame(size - 5) then
    return refuse(handle, "400", "3", "BadRequestException", "The call does not hold one whole message.")
  end
  local name, version = name_and_version(body:getBytes(5, size - 5))
  if not name or not sane(name) or not sane(version) then
    return refuse(handle, "400", "3", "BadRequestException", "The message is no request with a plain model_name.")
  end
  headers:replace(MODEL, name)
  if version ~= "" then headers:replace(VERSION, version) end
  return true
end

local function decoded(text)
  return (string.gsub(text, "%%(%x%x)", function(digits) return string.char(tonumber(digits, 16)) end))
end

local function from_path(headers, path)
  local rest = sub(path, #"/predictions/" + 1)
  local query = string.find(rest, "?", 1, true)
  local asked = query and sub(rest, query) or ""
  rest = query and sub(rest, 1, query - 1) or rest
  local name, version, more = string.match(rest, "^([^/]*)/?([^/]*)(.*)$")
  name, version = decoded(name), decoded(version)
  if not sane(name) or not sane(version) then return false end
  headers:replace(MODEL, name)
  if version ~= "" then headers:replace(VERSION, version) end
  headers:replace(REST, more .. asked)
  return true
end

local HIGHEST = 1000000 -- as LIMIT of runtime/telemetry/scores.py

-- Feedback that a client posts about an answer; `json_to_metadata` has parsed it.
local function feedback(handle)
  handle:body()
  local said = handle:streamInfo():dynamicMetadata():get("feedback") or {}
  local id, score = said["request_id"], said["score"]
  if type(id) ~= "string" or id == "" or not sane(id) or type(score) ~= "number"
      or not (score >= -HIGHEST and score <= HIGHEST) then
    return refuse(handle, "400", nil, "BadRequestException",
                  "Feedback is JSON like {'request_id': '...', 'score': 0.8}, of the content type application/json; "
                  .. "a score lies between -1,000,000 and 1,000,000.")
  end
  handle:respond({[":status"] = "202", ["content-type"] = "application/json"}, '{"accepted": true}\n')
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local path = headers:get(":path")
  if CALLS[path] then
    if not from_message(handle) then return end
  elseif string.match(path, "^/models/[^/?]+/invoke") then -- as Amazon SageMaker asks TorchServe
    local name = string.match(path, "^/models/([^/?]+)")
    if not from_path(headers, "/predictions/" .. name) then
      return refuse(handle, "404", nil, "ModelNotFoundException", "There is no model of that name.")
    end
    headers:replace(":path", "/predictions/" .. name)
  elseif sub(path, 1, 11) == "/v2/models/" then
    local name, rest = string.match(path, "^/v2/models/([^/?]+)(.*)$")
    local version = string.match(rest or "", "^/versions/([^/?]+)")
    name, version = decoded(name or ""), decoded(version or "")
    if name ~= "" and sane(name) and sane(version) then
      headers:replace(MODEL, name)
      if version ~= "" then headers:replace(VERSION, version) end
    end
  elseif sub(path, 1, 13) == "/predictions/" then
    if not METHODS[headers:get(":method")] then -- TorchServe describes itself when it is asked for its OPTIONS
      return refuse(handle, "405", nil, "MethodNotAllowedException", "A prediction is a POST, a PUT or a GET.")
    end
    if sub(string.lower(headers:get("content-type") or ""), 1, 10) == "multipart/" and
       (headers:get("content-encoding") or "identity") ~= "identity" then
      return refuse(handle, "415", nil, "BadRequestException",
                    "A form in parts cannot be compressed: send it without Content-Encoding.")
    end
    if not from_path(headers, path) then
      return refuse(handle, "404", nil, "ModelNotFoundException", "There is no model of that name.")
    end
  elseif path == "/feedback" and headers:get(":method") == "POST" then
    return feedback(handle)
  end
  handle:clearRouteCache()
  local refused = handle:metadata():get("refused")
  if refused then
    refuse(handle, refused["status"], refused["grpc_status"], refused["type"], refused["message"])
  end
end

-- Of an answer of several messages from the direct host: passes the messages on, and gives back the frame of trailers
-- at its end, if there is one (direct/grpc.py). `left`: the bytes of a message that are still to come.
local function trailers_at_end(handle)
  local left, head, last = 0, "", nil
  for chunk in handle:bodyChunks() do
    local size, at = chunk:length(), 0
    while at < size and not last do
      if left > 0 then
        local step = math.min(left, size - at)
        left, at = left - step, at + step
      elseif head == "" and byte(chunk:getBytes(at, 1)) == 128 then
        last = ""
      else
        local step = math.min(5 - #head, size - at)
        head, at = head .. chunk:getBytes(at, step), at + step
        if #head == 5 then
          left = ((byte(head, 2) * 256 + byte(head, 3)) * 256 + byte(head, 4)) * 256 + byte(head, 5)
          head = ""
        end
      end
    end
    if last and at < size then
      last = last .. chunk:getBytes(at, size - at)
      chunk:setBytes(at > 0 and chunk:getBytes(0, at) or "")
    end
  end
  return last and sub(last, 6)
end

-- Writes a frame of trailers at the end of the body into the trailer that the bridge has added.
local function move_trailers(handle)
  local written = trailers_at_end(handle)
  local trailers = written and handle:trailers()
  if not trailers then return end
  for name, value in string.gmatch(written, "([^:\r\n]+): ([^\r\n]*)\r\n") do
    if name == "x-status" then
      handle:streamInfo():dynamicMetadata():set("door", "failure", value)
    else
      trailers:replace(name, value)
    end
  end
end

-- Over gRPC, version.lua has set the HTTP status of a failure for the router to see; a gRPC answer itself has 200.
function envoy_on_response(handle)
  local headers = handle:headers()
  local kind = headers:get("content-type")
  if kind and sub(kind, 1, 16) == "application/grpc" then
    local status = headers:get(":status")
    if status ~= "200" then
      handle:streamInfo():dynamicMetadata():set("door", "failure", status)
      headers:replace(":status", "200")
    elseif headers:get("x-trailers-in-body") then
      headers:remove("x-trailers-in-body")
      move_trailers(handle)
    end
  end
end
