"""Keep the documents that rules let through, with their scores."""
