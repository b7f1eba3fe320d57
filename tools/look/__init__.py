"""See what data holds: samples, search, sources side by side, distributions, clusters, repeats; label documents."""
