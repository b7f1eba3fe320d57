"""What a model is, without torch: its resolved shape, a spec for each layer, its tensors and its FLOPs."""
