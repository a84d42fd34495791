"""HARD-KV: head-adaptive decode-time KV compression for stock SGLang. Importing it patches nothing."""

__version__ = "0.1.0"
