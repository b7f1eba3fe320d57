"""Complete commands, groups and keys in a shell: `source <(megalm completion bash)`, or zsh."""
