"""OpenAI's API, at `/v1`: a service behind Envoy that calls models through Envoy again."""
