"""Models that longctx brings itself."""
