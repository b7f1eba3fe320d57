"""What the Makefile and the tests build and check with."""
