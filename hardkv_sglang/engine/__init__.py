"""All that knows SGLang: hooks, runtime, compatibility, admission, refusals, attention backends, CPU platform."""
