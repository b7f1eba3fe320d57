"""What prepares data: documents, archives, tables, tokenizing, deduplication; one function over shards, mapped by an engine."""
