"""After pretraining: conversations and instructions as something to be learned."""
