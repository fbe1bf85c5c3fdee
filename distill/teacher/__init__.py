"""The teacher stage: asks a large language model for a rationale and a label of every input."""
