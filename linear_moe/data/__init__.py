"""Text into tokens: documents, the demo corpus, tokenizers."""
