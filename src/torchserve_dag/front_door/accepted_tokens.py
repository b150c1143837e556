"""Whom Envoy admits: the holders of tokens that were issued and not revoked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torchserve_dag.front_door.backend import Resource
from torchserve_dag.front_door.envoy_config import FEEDBACK, TOKENS_FILTER, TOKENS_KIND, TYPES, V1
from torchserve_dag.front_door.tokens import Token


def accepted_tokens(tokens: Sequence[Token]) -> Resource:
    """The filter that admits tokens that were issued and not revoked; `jwt_authn` has checked signature and expiry."""
    anywhere = [{"any": True}]
    v1: list[Resource] = [{"url_path": {"path": path}} for path in ({"prefix": f"{V1}/"}, {"exact": FEEDBACK})]
    policies = {"tokens": {"permissions": anywhere, "principals": _holders(one for one in tokens if not one.only_v1)}}
    if limited := [one for one in tokens if one.only_v1]:
        policies["only_v1"] = {"permissions": v1, "principals": _holders(limited)}
    rules = {"action": "ALLOW", "policies": policies}
    config = {"@type": f"{TYPES}{TOKENS_KIND}", "rules": rules}
    return {"@type": f"{TYPES}config.core.v3.TypedExtensionConfig", "name": TOKENS_FILTER, "typed_config": config}


def _holders(tokens: Iterable[Token]) -> list[Resource]:
    """Whoever has one of these tokens."""
    ids: list[Resource] = [
        {
            "sourced_metadata": {
                "metadata_matcher": {
                    "filter": "envoy.filters.http.jwt_authn",
                    "path": [{"key": "token"}, {"key": "jti"}],
                    "value": {"string_match": {"exact": token.id}},
                }
            }
        }
        for token in tokens
    ]
    return [{"or_ids": {"ids": ids}}] if ids else [{"not_id": {"any": True}}]
