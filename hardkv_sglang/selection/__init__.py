"""What is kept: pure torch, no device table and nothing of SGLang."""
