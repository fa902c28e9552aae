"""KV pages in three tiers, device, host and disk, addressed by the indices that a method selected."""

from longctx.store.attend import TierPart, attend_tiers
from longctx.store.errors import PageStoreError
from longctx.store.geometry import PageGeometry
from longctx.store.layer import StoreLayer
from longctx.store.page_store import PageStore
from longctx.store.selection import neighbours
from longctx.store.sequences import Claim
from longctx.store.stats import StoreStats
from longctx.store.summary import PageSummary

__all__ = [
    "Claim",
    "PageGeometry",
    "PageStore",
    "PageStoreError",
    "PageSummary",
    "StoreLayer",
    "StoreStats",
    "TierPart",
    "attend_tiers",
    "neighbours",
]
