"""SGLang's token pool seen as head pages, the per-request tables over it, and their integrity check."""
