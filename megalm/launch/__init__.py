"""From the words of a command line to ranks that train."""
