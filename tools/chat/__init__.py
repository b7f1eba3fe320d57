"""Talk with a trained model: in the terminal, on a local page, or through OpenAI's endpoints."""
