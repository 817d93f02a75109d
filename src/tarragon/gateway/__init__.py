"""The gateway: vLLM's OpenAI server over attention workers that may come and go (section 3.2)."""
