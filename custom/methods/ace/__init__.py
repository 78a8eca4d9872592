"""ACE: anatomically consistent embeddings in composition and decomposition (arXiv 2501.10131)."""
