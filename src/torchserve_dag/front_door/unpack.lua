-- Runs for calls over gRPC: takes a compressed message out of its frame, so that the next filter inflates it. request.lua puts
-- the message back into a frame. MAX_BODY and RATIO are defined before this text.

local byte = string.byte

local function refuse(handle, status, message)
  handle:respond({[":status"] = "200", ["content-type"] = "application/grpc", ["grpc-status"] = status,
                  ["grpc-message"] = message .. "%0ABadRequestException", ["grpc-accept-encoding"] = "identity,gzip"}, nil)
end

function envoy_on_request(handle)
  local coding = handle:headers():get("grpc-encoding")
  if not coding or coding == "identity" then return end
  local body = handle:body()
  local size = body and body:length() or 0
  if size < 5 or byte(body:getBytes(0, 1)) ~= 1 then return end -- a client may send any message as it is
  if coding ~= "gzip" then
    return refuse(handle, "12", "Messages are read as they are, or compressed with gzip.")
  end
  if size < 23 then
    return refuse(handle, "3", "The compressed message is cut off.")
  end
  local a, b, c, d = byte(body:getBytes(size - 4, 4), 1, 4)
  local whole = ((d * 256 + c) * 256 + b) * 256 + a -- RFC 1952: the size of what was compressed
  if whole > MAX_BODY then
    return refuse(handle, "8", "The message is larger than the server accepts.")
  end
  if whole > RATIO * (size - 5) then
    return refuse(handle, "8", "The message is more than " .. RATIO .. " times as large as it was sent: send it as it is.")
  end
  body:setBytes(body:getBytes(5, size - 5))
  local headers = handle:headers() -- fetched again: a handle from before a wait is invalid
  headers:remove("grpc-encoding")
  headers:replace("content-encoding", "gzip")
  headers:replace("x-door-inflated", tostring(whole))
end
