"""The decoder-only transformer, built from parallel layers."""
