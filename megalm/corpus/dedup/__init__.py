"""Finding what is there twice: documents, nearly equal documents, spans of tokens, evaluation text."""
