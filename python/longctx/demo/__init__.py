"""`longctx demo`: a long prompt through a real model on our kernels, every policy beside dense attention and SDPA."""
