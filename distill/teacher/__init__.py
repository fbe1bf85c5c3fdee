"""The teacher: an LLM that writes a rationale and a label for each input, and what it wrote."""
